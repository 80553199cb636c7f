"""``popmesh model tune`` on a small model: what people and programs read, and what is kept."""

from __future__ import annotations

import io
import json
from pathlib import Path

from click.testing import CliRunner
from rich.console import Console

from pop_node.store.machine import this_machine
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from pop_node.store.weight_choice import ShapeTimings, Timing
from pop_node.store.weight_tables import WeightTable, table_for
from popmesh.cli import main
from popmesh.render.tuning import tuning_table
from tests.pop_node.engine.tiny_llama import write_tiny_llama


def test_tuning_keeps_a_table_and_shows_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = tmp_path / "source"
    source.mkdir()
    (write_tiny_llama(source) / "tokenizer.json").write_text("{}")
    store.add(str(source), "tiny", "bfloat16", unwatched)
    command = ["model", "tune", "tiny", "--store", str(store.root), "--threads", "1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "Timing its steps" in result.stderr
    *lines, last = result.stdout.splitlines()
    kept = table_for(store.get("tiny").path, this_machine(1))
    assert kept is not None
    assert [line.split("\t")[1] for line in lines] == [
        f"{one.shape[0]}x{one.shape[1]}" for one in kept.shapes
    ]
    assert "weights: auto" in last
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert len(found["table"]["shapes"]) == len(found["kept"]) == len(kept.shapes)
    assert set(found["kept"].values()) <= {"plain", "resident"}
    missing = CliRunner().invoke(main, [*command[:2], "none", *command[3:]])
    assert missing.exit_code == 2


def test_the_table_says_what_follows() -> None:
    fast = ShapeTimings((3072, 576), 30, (Timing(1, 20.0, 16.0), Timing(512, 90.0, 90.0)))
    slow = ShapeTimings((576, 576), 30, (Timing(1, 8.0, 10.0),))
    console = Console(file=io.StringIO(), width=120, force_terminal=True, no_color=True)
    console.print(tuning_table(WeightTable(this_machine(2), (fast, slow))))
    assert isinstance(console.file, io.StringIO)
    first, second = (
        line for line in console.file.getvalue().splitlines() if line.strip("│ ").startswith("30 ")
    )
    assert all(part in first for part in ("30 3072x576", "1.25", "1.00", "1.18", "resident"))
    assert all(part in second for part in ("30 576x576", "0.80", "plain"))
