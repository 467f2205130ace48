"""What the tests of numbers share: a small random teacher, a fetched configuration over it, its job."""

from pathlib import Path
from typing import Any

from sparc3_world import roots
from tools import Fork, module_work, tiny_model

from lib.families import load
from lib.inputs.fetch import fetch
from lib.store import read_cell

CONFIG = """kind: numbers
name: few
sizes: {{tiny: {{id: {0}/model, dtype: float32}}}}
traits: [cat, neutral]
prompts: 40
run_id: 5
generate: {{engine: transformers, max_tokens: 12, batch: 16, at_once: 8}}
keep: 4
run: {{cells: 8, gpus: 0, log_seconds: 60}}
"""


def make_world(folder: Path, config: str = CONFIG) -> Path:
    tiny_model(folder / "model")
    (folder / "few.yaml").write_text(config.format(folder))
    fetch(load(folder / "few.yaml"), folder / "cache")
    return folder


def generating(folder: Path, *overrides: str, index: int = 0, **env: str) -> Fork:
    """The job of one cell, begun."""
    arguments = ("--config", str(folder / "few.yaml"), "--index", str(index), *overrides)
    return Fork(module_work("jobs.generate_numbers", *arguments, env=roots(folder, **env)))


def generate(folder: Path, *overrides: str, index: int = 0, **env: str) -> None:
    done = generating(folder, *overrides, index=index, **env).finish()
    assert done.returncode == 0, done.stderr[-3000:]


def cell_of(folder: Path, *overrides: str, index: int = 0, scratch: str = "scratch") -> Any:
    return load(folder / "few.yaml", list(overrides)).cells(folder / "cache", folder / scratch)[index]


def rows(folder: Path, *overrides: str, index: int = 0, scratch: str = "scratch") -> dict[str, Any]:
    """A cell's columns, as lists."""
    schema = load(folder / "few.yaml", list(overrides)).schema(folder / "cache")
    found = read_cell(cell_of(folder, *overrides, index=index, scratch=scratch), schema, schema)
    return {name: list(values) for name, values in found.items()}
