"""``popmesh topology plan``: where sizes come from, what people and programs read, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from pop_node.store.store import Store
from popmesh.cli import main
from topology.budget import ENGINE_BYTES

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
KV_BYTES = 2 * 3 * 2 * 4 * 4  # K and V of 3 layers, 2 heads of 4, float32


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Holds ``tiny`` in float32."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.norm.weight": np.ones(8, np.float32)}, folder / "model.safetensors")
    store = Store(tmp_path / "store")
    store.add(str(folder), "tiny", "float32", lambda *_: None)
    return store.root


def plan(tmp_path: Path, models: str, node: str, *options: str) -> Result:
    file = tmp_path / "mesh.yaml"
    file.write_text(
        f"mesh: m\nmodels:\n{models}\nsites:\n  fra: {{lat: 50, lon: 8, region: eu}}\n"
        f"nodes:\n  fra-1:\n    site: fra\n    kv_tokens: 100\n{node}\n"
    )
    return CliRunner().invoke(main, ["topology", "plan", str(file), *options])


def as_json(result: Result) -> Any:
    return json.loads(result.stdout)


def test_sizes_come_from_the_store(tmp_path: Path, store: Path) -> None:
    result = plan(
        tmp_path, "  tiny: {dtype: float32}", "    memory_gb: 1", "--store", str(store), "--json"
    )
    assert result.exit_code == 0, result.output
    found = as_json(result)
    assert found["fits"]
    (placed,) = found["nodes"][0]["models"]
    manifest = Store(store).get("tiny").manifest
    assert placed["disk_bytes"] == manifest.total_bytes
    assert placed["memory_bytes"] == manifest.data.nbytes + 100 * KV_BYTES + ENGINE_BYTES
    assert placed["room_tokens"] == (10**9 - placed["memory_bytes"]) // KV_BYTES
    assert placed["is_warm"]


def test_sizes_come_from_the_bundle_at_a_url(tmp_path: Path, store: Path) -> None:
    bundle = Store(store).get("tiny").path
    models = f"  afar: {{dtype: float32, source: 'file://{bundle}'}}"
    result = plan(tmp_path, models, "", "--store", str(tmp_path / "none"), "--json")
    assert result.exit_code == 0, result.output
    (placed,) = as_json(result)["nodes"][0]["models"]
    assert placed["disk_bytes"] == Store(store).get("tiny").manifest.total_bytes


def test_a_url_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    models = f"  afar: {{source: 'file://{tmp_path}/gone'}}"
    result = plan(tmp_path, models, "", "--store", str(tmp_path), "--json")
    assert result.exit_code == 1
    (problem,) = as_json(result)["problems"]
    assert "gone" in problem["message"]
    assert problem["where"].endswith("mesh.yaml:3")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("{dtype: bfloat16}", "it is there in float32, the topology asks for bfloat16"),
        (f"{{dtype: float32, digest: {'ab' * 32}}}", "the topology pins abababababab"),
    ],
)
def test_a_model_that_nodes_would_refuse_has_no_size(
    tmp_path: Path, store: Path, model: str, why: str
) -> None:
    result = plan(tmp_path, f"  tiny: {model}", "", "--store", str(store), "--json")
    assert result.exit_code == 1
    assert why in as_json(result)["problems"][0]["message"]


def test_what_does_not_fit_is_said_with_its_line_and_the_exit_code(tmp_path: Path) -> None:
    result = plan(
        tmp_path,
        "  big: {}\n  small: {}",
        "    memory_gb: 20\n    disk_gb: 16.5",
        *("--store", str(tmp_path / "none")),
        *("--size", "big=16.1GB:131072", "--size", "small=21GB"),
    )
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "mesh.yaml:12: the models of fra-1 take 37.100 GB of its disk, 20.600 GB more" in said
    assert "mesh.yaml:11: 'small' can never be loaded on fra-1" in said
    assert "1.300 GB more than memory_gb" in said
    assert "Everything fits" not in said
    assert "of 20 GB" in said
    assert "16.4 GB" in said


def test_what_fits_is_said_too(tmp_path: Path) -> None:
    result = plan(tmp_path, "  big: {}", "", "--store", str(tmp_path), "--size", "big=16.1GB")
    assert result.exit_code == 0
    assert "Everything fits." in result.output
    assert "origin" in result.output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("bug=1GB", "did you mean 'big'?"),
        ("big", "is no model's size"),
        ("big=lots", "is not a size"),
        ("big=1GB:x", "is not a size"),
    ],
)
def test_a_size_that_cannot_be_read_is_refused(tmp_path: Path, given: str, words: str) -> None:
    result = plan(tmp_path, "  big: {}", "", "--size", given)
    assert result.exit_code == 2
    assert words in result.output
