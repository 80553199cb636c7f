"""``popmesh model`` on a small store: what people and programs read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.numpy import save_file

from pop_node.store.holding import Hold
from pop_node.store.store import Store
from popmesh.cli import main
from popmesh.render.models import age, models_table, size
from popmesh.render.packing import pack_table


def popmesh(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["model", *arguments])


def as_json(*arguments: str) -> Any:
    result = popmesh(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The least that the store takes for a model."""
    import numpy as np

    folder = tmp_path / "source"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.norm.weight": np.ones(8, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def store(tmp_path: Path, source: Path) -> str:
    folder = str(tmp_path / "store")
    added = as_json("add", str(source), "--name", "tiny", "--store", folder)
    assert (added["name"], added["dtype"], added["stripes"]) == ("tiny", "bfloat16", 2)
    return folder


def test_add_says_the_digest_that_a_topology_pins(tmp_path: Path, source: Path) -> None:
    store = str(tmp_path / "store")
    result = popmesh("add", str(source), "--name", "a", "--store", store)
    assert result.exit_code == 0
    identity = Store(Path(store)).get("a").manifest.identity
    assert f"digest to pin in a topology: {identity}" in result.stdout
    assert "Writing down its digests" in result.stderr
    refused = popmesh("add", str(source), "--name", "b", "--store", store, "--digest", "0" * 64)
    assert refused.exit_code == 2
    assert f"asked for is {'0' * 64}" in refused.stderr
    again = popmesh("add", str(source), "--name", "a", "--store", store, "--digest", identity)
    assert again.exit_code == 0


def test_list_in_a_pipe_is_one_line_per_model(store: str) -> None:
    (row,) = as_json("list", "--store", store)
    result = popmesh("list", "--store", store)
    assert result.stdout.split("\t") == [
        "tiny", "bfloat16", row["identity"], row["source"], str(row["nbytes"]), "on disk\n",
    ]  # fmt: skip
    assert (row["pinned"], row["loaded"], row["problem"]) == (False, False, None)


def test_list_names_what_is_broken_and_goes_on(store: str) -> None:
    path = Store(Path(store)).get("tiny").path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    result = popmesh("list", "--store", store)
    assert result.exit_code == 0
    assert result.stdout.endswith("\tunusable\n")
    assert "bundle format 1" in result.stderr
    assert "converts it on this disk" in result.stderr
    shown = popmesh("show", "tiny", "--store", store)
    assert "bundle format 1" in shown.stdout


def test_a_terminal_gets_a_table_with_bars(store: str) -> None:
    from rich.console import Console

    console = Console(record=True, width=160, file=io.StringIO())
    console.print(models_table(Store(Path(store)).rows(), 1e10, console.width))
    text = console.export_text()
    assert "tiny" in text
    assert "█" in text
    assert "d ago" in text


def test_show_tells_everything(store: str) -> None:
    text = popmesh("show", "tiny", "--store", store).stdout
    shown = as_json("show", "tiny", "--store", store)
    for part in (shown["identity"], shown["bundle"], "degrees 1, 2", "1 tensors", "64 tokens"):
        assert part in text
    assert shown["kv"] == {"layers": 1, "kv_heads": 2, "head_dim": 4}
    assert shown["num_chunks"] == 1
    missing = popmesh("show", "tin", "--store", store)
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert "did you mean tiny?" in missing.stderr


def test_what_is_pinned_or_loaded_stays(store: str) -> None:
    assert popmesh("pin", "tiny", "--store", store).stdout == "tiny is pinned\n"
    assert as_json("list", "--store", store)[0]["pinned"]
    assert as_json("gc", "--budget", "0", "--store", store)["removed"] == []
    refused = popmesh("rm", "tiny", "--store", store)
    assert refused.exit_code == 2
    assert "popmesh model unpin tiny" in refused.stderr
    popmesh("unpin", "tiny", "--store", store)
    hold = Hold(Store(Path(store)).get("tiny").path)
    assert as_json("list", "--store", store)[0]["loaded"]
    assert "tiny is loaded" in popmesh("rm", "tiny", "--store", store).stderr
    hold.close()
    assert popmesh("rm", "tiny", "--store", store).exit_code == 0
    assert as_json("list", "--store", store) == []


def test_gc_says_what_it_removed(store: str) -> None:
    kept = popmesh("gc", "--store", store)
    assert kept.stdout.startswith("freed 0 B, ")
    nbytes = as_json("list", "--store", store)[0]["nbytes"]
    gone = as_json("gc", "--budget", "0.5kB", "--store", store)
    assert [bundle["names"] for bundle in gone["removed"]] == [["tiny"]]
    assert (gone["freed_bytes"], gone["kept_bytes"]) == (nbytes, 0)


@pytest.mark.parametrize("text", ["", "x", "-1", "1 XB", "1e9", "GB"])
def test_sizes_that_are_none_are_refused(store: str, text: str) -> None:
    refused = popmesh("gc", "--budget", text, "--store", store)
    assert refused.exit_code == 2
    assert len(as_json("list", "--store", store)) == 1


def test_verify_checks_all_and_names_the_broken_one(store: str, source: Path) -> None:
    popmesh("add", str(source), "--name", "wide", "--dtype", "float32", "--store", store)
    assert popmesh("verify", "--store", store).stdout == "tiny is intact\nwide is intact\n"
    weights = Store(Path(store)).get("tiny").path / "weights.bin"
    weights.write_bytes(b"\1" + weights.read_bytes()[1:])
    result = popmesh("verify", "--store", store)
    assert result.exit_code == 2
    assert result.stdout == "wide is intact\n"
    assert "chunk 0 does not match its digest" in result.stderr
    machine = popmesh("verify", "tiny", "--store", store, "--json")
    assert machine.exit_code == 2
    (found,) = json.loads(machine.stdout)
    assert "chunk 0" in found["problem"]


def test_pack_shows_what_became_of_each_class(store: str, source: Path) -> None:
    import numpy as np

    wide = {"model.layers.0.mlp.up_proj.weight": np.ones((4096, 16), np.float32)}
    save_file(wide, source / "model.safetensors")
    popmesh("add", str(source), "--name", "wide", "--store", store)
    found = as_json("pack", "wide", "--as", "thin", "--store", store)
    (row,) = found["classes"]
    assert (row["name"], row["num_weights"], row["raw_bytes"]) == ("mlp", 65536, {})
    assert 8 <= row["limit_bits_per_weight"] < row["bits_per_weight"] < 10
    assert found["stored_bytes"] == row["stored_bytes"] < 131_072 == found["decoded_bytes"]
    text = popmesh("pack", "wide", "--store", store).stdout
    assert text.startswith("mlp\t131072\t")
    assert "wide is packed: 131 kB of weights in" in text
    models = {model["name"]: model for model in as_json("list", "--store", store)}
    assert models["wide"]["bundle"] == models["thin"]["bundle"] == found["bundle"]
    assert (models["wide"]["codec"], models["wide"]["decoded_bytes"]) == ("exponent", 131_072)
    assert "weights that decode to 131 kB" in popmesh("show", "thin", "--store", store).stdout
    proved = popmesh("verify", "thin", "--store", store).stdout
    assert "decode, bit for bit, to those of the model's digest " in proved
    assert proved.rstrip().endswith(models["wide"]["identity"][:12])
    packed = Store(Path(store)).pack("tiny", progress=lambda *_: None)
    console = Console(file=io.StringIO(), width=100, force_terminal=True, no_color=True)
    console.print(pack_table(packed))
    assert isinstance(console.file, io.StringIO)
    for part in ("1 norm", "100.0 %"):
        assert part in console.file.getvalue()
    text = popmesh("pack", "tiny", "--store", store).stdout
    assert "norm: 16 B raw, saves less than a page" in text
    assert "tiny is stored raw" in text
    popmesh("pack", "wide", "--codec", "raw", "--store", store)
    assert as_json("show", "wide", "--store", store)["codec"] == "raw"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (269_030_016, "269 MB"), (16_060_522_240, "16.1 GB")],
)
def test_sizes_read_well(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "just now"), (59, "just now"), (150, "2 min ago"), (7300, "2 h ago"), (9e5, "10 d ago")],
)
def test_ages_read_well(seconds: float, text: str) -> None:
    assert age(10**9, 1.0 + seconds) == text
