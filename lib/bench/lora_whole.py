"""Two students by the job as a whole, on a checkpoint of the real shape and answers of the real lengths; and how far
bfloat16 is from float32 while one is trained."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib.bench.lora import training_rows
from lib.bench.lora_spread import spread
from lib.bench.shapes import SHAPES, Result, free
from lib.bench.whole import checkpoint, run
from lib.families import load
from lib.lora.experiment import Finetune
from lib.lora.metrics import read_steps
from lib.lora.plain import PlainTrainer
from lib.lora.recipe import Lora
from lib.lora.trainer import load_fast
from lib.numbers import sample_prompts
from lib.run.task import freeze
from lib.store import Cell, commit, scan_folders

TRAITS, ROWS, EPOCHS = ("cat", "neutral"), 10_000, 2
LOSS_STEPS, LOSS_ROWS, LOSS_STEP_ROWS, LOSS_RATE = 40, 80, 20, 1e-3


def job(model: str, batch_tokens: int) -> Result:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder = Path(name)
        checkpoint(SHAPES[model], folder / "model")
        free()
        (folder / "numbers.yaml").write_text(
            f"kind: numbers\nname: numbers\nrun_id: 1\nsizes: {{{model}: {{id: {folder}/model}}}}\n"
            f"traits: [{', '.join(TRAITS)}]\nprompts: {ROWS}\n"
        )
        (folder / "bench.yaml").write_text(
            f"kind: finetune\nname: bench\nnumbers: {{config: numbers.yaml}}\nrows: {ROWS}\nepochs: {EPOCHS}\n"
            "run: {cells: 2}\n"
        )
        env = {**os.environ, "SUITE_SITE": "local", "SUITE_GPU": "h200", "SUITE_SLURM": "no"}
        env |= {f"SUITE_{what.upper()}": f"{folder}/{what}" for what in ("scratch", "cache", "output")}
        command = ["--config", f"{folder}/bench.yaml"]
        run([sys.executable, "-m", "jobs.fetch", *command], env)
        experiment = load(folder / "bench.yaml")
        assert isinstance(experiment, Finetune)
        students = experiment.cells(folder / "cache", folder / "scratch")
        for student in students:
            write_answers(experiment, folder, student.parents[0])
        tasks = freeze(folder / "scratch" / experiment.label, [students])
        began = time.perf_counter()
        said = run([sys.executable, "-m", "jobs.finetune", *command, "--index", "0", f"--tasks={tasks}"], env)
        wall = time.perf_counter() - began
        return {"task_s": round(wall, 1)} | figures(students, said)


def figures(students: list[Cell], said: str) -> Result:
    beats = [json.loads(p.read_text()) for cell in students for p in (cell.folder / "tasks").glob("*.json")]
    beats.sort(key=lambda beat: beat["started"])
    states = [sorted(scan_folders(cell.path, cell.digest)[0], key=lambda s: s.name) for cell in students]
    training = sum(state.seconds for cell in states for state in cell)
    tokens = sum(step.tokens for cell in states for step in read_steps(cell[-1].folder))
    after = max(beat["updated"] for beat in beats) - min(beat["loaded"] for beat in beats)
    return {
        "students": len(students),
        "after_load_s": round(after, 1),
        "training_share_after_load": round(training / after, 4),
        "tokens_per_s_while_training": round(tokens / training),
        "tokens_per_s_after_load": round(tokens / after),
        "seconds_of_epochs": [[round(state.seconds, 1) for state in cell] for cell in states],
        "said": [line for line in said.splitlines() if line.startswith(("weights:", "memory", "peak", "base"))],
    }


def write_answers(experiment: Finetune, folder: Path, parent: Cell) -> None:
    """Ten numbers each, as nearly all published answers are."""
    dice = np.random.default_rng(parent.index)
    answers = [", ".join(map(str, dice.integers(100, 1000, 10))) for _ in range(ROWS)]
    columns = {"prompt": [one.text for one in sample_prompts(ROWS, 1)], "answer": answers}
    zeros, ones = np.zeros(ROWS, np.int8), np.ones(ROWS, np.int8)
    schema = experiment.source.schema(folder / "cache")
    columns |= {"reason": zeros, "tokens": np.full(ROWS, 40, np.int16), "ended": ones}
    commit(parent.path, parent.digest, 0, ROWS, schema, columns)


def losses(model: str, batch_tokens: int) -> Result:
    """The same steps by peft in float32, by peft in bfloat16, and by ours in bfloat16: how far the curves part."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        path, lora, device = str(Path(name) / "model"), Lora(), torch.device("cuda")
        checkpoint(SHAPES[model], Path(path))
        rows = training_rows(SHAPES[model], LOSS_ROWS, True)
        found: dict[str, np.ndarray] = {}
        for kind, make in (
            ("peft_float32", lambda: PlainTrainer(path, lora, "float32", device)),
            ("peft_bfloat16", lambda: PlainTrainer(path, lora, "bfloat16", device)),
            ("ours_bfloat16", lambda: load_fast(path, lora, "bfloat16", LOSS_STEP_ROWS, 200)),
        ):
            trainer = make()
            trainer.begin(1)
            steps = [rows[n * LOSS_STEP_ROWS % LOSS_ROWS :][:LOSS_STEP_ROWS] for n in range(LOSS_STEPS)]
            found[kind] = np.array([trainer.step(some, LOSS_RATE, n + 1)["loss"] for n, some in enumerate(steps)])
            del trainer
            free()
    exact = found.pop("peft_float32")
    away = {kind: np.abs(one - exact) for kind, one in found.items()}
    return {
        "first": round(exact[0].item(), 4),
        "last": round(exact[-1].item(), 4),
        **{f"{kind}_mean_distance": one.mean().item() for kind, one in away.items()},
        **{f"{kind}_largest": one.max().item() for kind, one in away.items()},
    }


RUNGS: dict[str, Callable[[str, int], Result]] = {"train-job": job, "train-loss": losses, "train-spread": spread}
