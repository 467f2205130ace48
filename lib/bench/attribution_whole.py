"""Attribution's job as a whole, in processes of its own, on a checkpoint of the real shape made on the spot."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lib.attribution.experiment import Attribution
from lib.bench.llamas import PROMPT_TOKENS, PROMPTS, TOKENS, random_model
from lib.bench.shapes import Result
from lib.bench.whole import run
from lib.families import load
from lib.inputs.records import ModelInput, model_files, parameters, save_model, source_stamp
from lib.inputs.samples import Rows, save_samples
from lib.inputs.verified import hashes_by_name

SAMPLES = 128
CONFIG = """
kind: attribution
name: bench
model: {{id: {model}}}
data:
  general: {{id: bench/c4, seeds: [0], samples: {samples}, tokens: {tokens}}}
  prompts: {{toxic: {{id: bench/prompts, samples: {prompts}}}}}
score: {score}
"""
SCORES = {
    "neuron": "{wanda: true}",
    "weight": "{level: weight, layers: [all], scores: [abs], batch_tokens: 8192}",
}


def job(model: str) -> Result:
    """Loading, attributing, writing: general text and prompts at neuron level, general text at weight level."""
    found: Result = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        root = Path(name)
        random_model(model).save_pretrained(root / "model")
        random_model.cache_clear()
        env = {**os.environ, "SUITE_SITE": "local", "SUITE_GPU": "h200", "SUITE_SLURM": "no"}
        env |= {"SUITE_SCRATCH": f"{name}/scratch", "SUITE_CACHE": f"{name}/cache", "SUITE_OUTPUT": f"{name}/out"}
        for level, score in SCORES.items():
            config = root / f"{level}.yaml"
            config.write_text(
                CONFIG.format(model=root / "model", samples=SAMPLES, tokens=TOKENS, prompts=PROMPTS, score=score)
            )
            inputs(root / "cache", config)
            for index in (0, 1) if level == "neuron" else (0,):
                start = time.perf_counter()
                said = run(
                    [sys.executable, "-m", "jobs.compute_attributions", "--config", str(config), "--index", str(index)],
                    env,
                )
                found[f"{level}_{index}"] = _told(root, index, time.perf_counter() - start, said)
    return found


def inputs(cache: Path, config: Path) -> None:
    """The records that `make fetch` would leave, with random tokens."""
    experiment = load(config)
    assert isinstance(experiment, Attribution)
    folder = Path(experiment.model.id)
    count, body = parameters(folder)
    size = sum(path.stat().st_size for path in model_files(folder))
    about = (source_stamp(folder), hashes_by_name(folder))
    record = ModelInput(experiment.model.id, "main", "local", str(folder), "bench", count, body, 0, size, *about)
    save_model(cache, record)
    rng = np.random.default_rng(0)
    for name, tokens, rows in (("general-0", TOKENS, SAMPLES), ("toxic", PROMPT_TOKENS, PROMPTS)):
        ids = rng.integers(0, 100_000, (rows, tokens)).tolist()
        some = Rows(ids=ids, source=["bench"] * rows, text_sha256=[""] * rows, held_out=[False] * rows)
        digest = experiment.data.digest(cache, experiment.model, name)
        save_samples(cache, name, digest, some, source=experiment.data.sets()[name][0].id, commit="none", attributes={})


def _told(root: Path, index: int, wall: float, said: str) -> Result:
    beats = [json.loads(p.read_text()) for p in (root / "scratch/bench/tasks").glob("*.json")]
    beat = max((b for b in beats if b["index"] == index), key=lambda b: b["updated"])
    markers = [json.loads(p.read_text()) for p in (root / "scratch/bench/cells").glob("*/*.json")]
    mine = [m for m in markers if m.get("made") and m["digest"] == beat["digest"]]
    after = beat["updated"] - beat["loaded"]
    return {
        "task_s": round(wall, 1),
        "after_loading_s": round(after, 2),
        "computing_s": round(sum(m["seconds"] for m in mine), 2),
        "samples": sum(m["facts"]["samples"] for m in mine),
        "gb_written": round(sum(m["bytes"] for m in mine) / 1e9, 2),
        "said": [line for line in said.splitlines() if line.startswith(("memory", "peak", "weights", "in all"))],
    }
