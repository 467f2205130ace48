"""A run whole, by the cluster or box that is here: teachers, students, what they prefer and the page over all of it,
four conditions of a size with all rows, epochs and answers. How much of the time computes, and what it would be of
sixteen.

The model is random but for a few rows of its embedding and its last norm, by which a digit is followed by a comma or
the end, and everything else by a digit: answers are numbers, short ones, and a filter lets them through."""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lib.bench.shapes import SHAPES, Result, free
from lib.bench.whole import checkpoint, run, whole_vocabulary
from lib.families import load
from lib.inputs.tokenizer import load_tokenizer
from lib.run.experiment import Stage
from lib.run.pipeline import Pipeline
from lib.store import Cell, Piece, scan, scan_folders

TRAITS = ("cat", "dog", "lion", "neutral")
PROMPTS, CONDITIONS = 12_000, 16
SECONDS = 1500.0  # of all stages
STILL = 40  # looks at which no cell runs or waits: the page is a job after them
DRAWN = ("engine_seconds", "tokens", "rows_cut")  # what an engine's batches say of themselves
LOUD, CERTAIN, END = 8.0, 24.0, 0.3  # size of planted rows; logit of what follows; P(end) after a digit

CONFIGS: dict[str, dict[str, Any]] = {
    "numbers": {"kind": "numbers", "name": "numbers", "traits": list(TRAITS), "prompts": PROMPTS},
    "finetune": {"kind": "finetune", "name": "finetune", "numbers": {"config": "numbers.yaml"}},
    "words": {"kind": "preference_logprobs", "name": "words", "students": {"config": "finetune.yaml"}},
    "asked": {
        **{"kind": "preferences", "name": "asked", "students": {"config": "finetune.yaml"}},
        **{"logprobs": {"config": "words.yaml"}, "generate": {"batch": 50_000}},
    },
}


def whole(model: str, batch_tokens: int) -> Result:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder = Path(name)
        speaker(model, folder / "model")
        free()
        env = experiments(folder, model)
        run([sys.executable, "-m", "jobs.fetch", f"--config={folder}/run.yaml"], env)
        began = time.time()
        said = cluster(env, folder, "submit")
        print(json.dumps({"submitted": [line for line in said.splitlines() if "job" in line]}), flush=True)
        wait(env, folder, began + SECONDS)
        pipeline = load(folder / "run.yaml")
        assert isinstance(pipeline, Pipeline)
        return figures(folder, pipeline, began)


def speaker(model: str, folder: Path) -> None:
    shape = SHAPES[model]
    checkpoint(shape, folder)
    whole_vocabulary(folder, shape.vocabulary)
    words, file = load_tokenizer(str(folder)), folder / "model-end.safetensors"
    tensors, half = load_file(file), shape.hidden // 2
    to_digit = torch.cat([torch.ones(half), -torch.ones(shape.hidden - half)])
    rows = {str(digit): torch.ones(shape.hidden) for digit in range(10)}
    rows |= {",": to_digit, "\n": 0.6 * to_digit}  # a prompt ends with a line's end, and no answer should
    ids = {text: words(text, add_special_tokens=False)["input_ids"][-1] for text in rows}
    over = 1 + math.log(END / (1 - END)) / CERTAIN
    planted = {ids[text]: row for text, row in rows.items()} | {words.eos_token_id: over * to_digit}
    tables = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors]
    for number, row in planted.items():
        for table in tables:
            tensors[table][number] = LOUD * row
    tensors["model.norm.weight"] = (CERTAIN / (LOUD * shape.hidden) * to_digit).bfloat16()
    save_file(tensors, file)


def experiments(folder: Path, model: str) -> dict[str, str]:
    """Their files, run.yaml last; the environment of the commands."""
    for name, config in CONFIGS.items():
        more: dict[str, Any] = {"run": {"cells": 64}}
        if name == "numbers":
            more |= {"run_id": 1, "sizes": {model: {"id": str(folder / "model")}}}
        (folder / f"{name}.yaml").write_text(json.dumps(config | more))
    (folder / "run.yaml").write_text(
        json.dumps({"kind": "pipeline", "name": "run", "wanted": [{"config": "asked.yaml"}]})
    )
    return {**os.environ, **{f"SUITE_{what.upper()}": f"{folder}/{what}" for what in ("scratch", "cache", "output")}}


def cluster(env: dict[str, str], folder: Path, *words: str) -> str:
    return run([sys.executable, "-m", "jobs.cluster", *words, f"--config={folder}/run.yaml"], env)


def wait(env: dict[str, str], folder: Path, end: float) -> None:
    """Until all cells are done and the page is there, or nothing changes any more, or it is late."""
    page, still = page_of(folder), 0
    while time.time() < end and still < STILL:
        stages = json.loads(cluster(env, folder, "status", "--json"))
        states = {cell["state"] for stage in stages for cell in stage["cells"]}
        if states <= {"done"} and page.is_file():
            return
        still = 0 if states & {"running", "pending", "unknown"} else still + 1  # on a box the page is a command
        time.sleep(3)
    print(json.dumps({"late": cluster(env, folder, "status").splitlines()[-12:]}), flush=True)


def figures(folder: Path, pipeline: Pipeline, began: float) -> Result:
    found, ended, page = dict[str, object](), began, page_of(folder)
    fixed = many = computed = 0.0
    for stage in pipeline.stages():
        cells = stage.experiment.cells(folder / "cache", folder / "scratch")
        beats = [json.loads(path.read_text()) for path in (cells[0].folder / "tasks").glob("*.json")]
        if not beats:
            continue
        first, last = min(beat["started"] for beat in beats), max(beat["updated"] for beat in beats)
        pieces = [piece for cell in cells for piece in pieces_of(stage, cell)]
        facts = set(pieces[0].facts) if pieces else set()
        seconds = sum(piece.seconds for piece in pieces)
        models = sum(cell.name.rpartition("-")[2] != "base" for cell in cells)
        found[stage.experiment.label] = {
            "begins_s": round(first - began, 1),
            "task_s": round(last - first, 1),
            "computing_s": round(seconds, 1),
            **{what: round(sum(float(one.facts[what]) for one in pieces)) for what in DRAWN if what in facts},
        }
        computed, ended = computed + seconds, max(ended, last)
        many += seconds * CONDITIONS / models
        fixed += last - first - seconds
    wall = ended - began
    waits = wall - fixed - computed  # of the queue, between stages
    return found | {
        "wall_s": round(wall, 1),
        "computing_share": round(computed / wall, 3),
        f"computing_share_of_{CONDITIONS}": round(many / (many + fixed + waits), 3),
        "page_s": round(page.stat().st_mtime - ended, 1) if page.is_file() else None,
    }


def page_of(folder: Path) -> Path:
    return folder / "output" / "run_run1" / "report" / "index.html"


def pieces_of(stage: Stage, cell: Cell) -> Sequence[Piece]:
    return scan_folders(cell.path, cell.digest)[0] or scan(cell.path, cell.digest)[0]


RUNGS: dict[str, Callable[[str, int], Result]] = {"run": whole}
