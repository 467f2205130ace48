"""A sweep by the job as a whole, after its own attribution and selection, on a checkpoint of the real shape and two
judges as large as BERT's base: how much of the time computes, and whether what it said beforehand was so."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from lib.bench.llamas import PROMPT_TOKENS, config_of
from lib.bench.shapes import Result, free
from lib.bench.whole import beats_in, run, save_random, whole_vocabulary
from lib.checkpoint.families import gated_shape
from lib.families import load
from lib.pruning.sweep import Sweep
from lib.run.experiment import Experiment
from lib.run.task import freeze
from lib.store import Cell, read_cell, scan

GPU = "h200"  # by whose rate the experiment estimates itself
WINDOW, WINDOWS = 2048, 64
PROMPTS, SAMPLES, NEW = 80, 25, 50  # every second prompt is completed, the others are attributed
GENERAL, GENERAL_TOKENS = 8, 256
SIZES = (10, 30, 100, 300)
LETTERS = 300  # tokens that the small tokenizer learns; the others are words
JUDGE = (12, 768, 3072, 12)  # layers, hidden, inner, heads: BERT's base
JUDGES = ("judge", "second-judge")

ATTRIBUTION = """kind: attribution
name: attribution
model: {{id: {folder}/model}}
data:
  general: {{id: {folder}/general.jsonl, seeds: [0], samples: {general}, tokens: {general_tokens}}}
  prompts: {{some: {{id: {folder}/prompts.jsonl, select: all, samples: {prompts}, held_out: true}}}}
  text: {{id: {folder}/text.jsonl}}
score: {{scores: [signed]}}
run: {{cells: 64}}
"""
SELECTION = """kind: selection
name: selection
attribution: {{config: attribution.yaml}}
undesired: some
methods: [lrp, random]
draws: 1
neurons: {neurons}
run: {{cells: 64, gpus: 0}}
"""
SWEEP = """kind: sweep
name: bench
selection: {{config: selection.yaml}}
sizes: {sizes}
evaluate:
  window: {window}
  completions: {{per_prompt: {samples}, tokens: {new}, temperature: 0.7}}
  judges: [{judges}]
  batch_tokens: {batch_tokens}
run: {{cells: 64}}
"""


def job(model: str, batch_tokens: int) -> Result:
    """Everything from fetching on; the sweep's settings share one load."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder = Path(name)
        with said("inputs"):
            experiment = inputs(folder, model, batch_tokens)
        env = {**os.environ, "SUITE_SITE": "local", "SUITE_GPU": GPU, "SUITE_SLURM": "no"}
        env |= {f"SUITE_{what.upper()}": f"{folder}/{what}" for what in ("scratch", "cache", "output")}
        with said("fetch"):
            run([sys.executable, "-m", "jobs.fetch", "--config", f"{folder}/sweep.yaml"], env)
        for stage in experiment.stages():
            with said(stage.experiment.job):
                task(folder, stage.config, stage.experiment, env)
        began = time.perf_counter()
        with said(experiment.job):
            cells, words = task(folder, folder / "sweep.yaml", experiment, env)
        wall = time.perf_counter() - began
        return {"task_s": round(wall, 1)} | figures(folder, experiment, cells, words)


@contextmanager
def said(step: str) -> Iterator[None]:
    """A line for each step at once: what is stopped has told how far it came."""
    began = time.perf_counter()
    yield
    print(json.dumps({"step": step, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


def task(folder: Path, config: Path, experiment: Experiment, env: dict[str, str]) -> tuple[list[Cell], str]:
    """All cells of an experiment as one task."""
    cells = experiment.cells(folder / "cache", folder / "scratch")
    tasks = freeze(folder / "scratch" / experiment.label, [cells])
    command = ["--config", str(config), "--index", "0", f"--tasks={tasks}"]
    return cells, run([sys.executable, "-m", f"jobs.{experiment.job}", *command], env)


def figures(folder: Path, experiment: Sweep, cells: list[Cell], words: str) -> Result:
    cache, beats = folder / "cache", beats_in(folder)
    pieces = [piece for cell in cells for piece in scan(cell.path, cell.digest)[0]]  # in the order of their making
    warm = pieces[1:]  # the first compiles
    measured = float(np.mean([piece.seconds for piece in warm]))
    parts = {
        name: float(np.mean([float(piece.facts[f"seconds_{name}"]) for piece in warm]))
        for name in ("perplexity", "completions", "judges")
    }
    estimates = experiment.seconds(cache, GPU)
    (judged,) = experiment.judged()
    texts = experiment.prompts(cache, judged) * experiment.evaluate.completions.per_prompt
    tokens = [read_cell(cell, experiment.schema(cache), [f"tokens/{judged}"])[f"tokens/{judged}"] for cell in cells]
    after = max(beat["updated"] for beat in beats) - min(beat["loaded"] for beat in beats)
    return {
        "settings": len(pieces),
        "after_load_s": round(after, 2),
        "computing_share_of_wall_after_load": round(sum(piece.seconds for piece in pieces) / after, 4),
        "first_setting_s": round(pieces[0].seconds, 2),
        "setting_s": round(measured, 3),
        "estimated_setting_s": round(sum(estimates), 3),
        "measured_of_estimated": round(measured / sum(estimates), 3),
        "parts_s": {name: round(value, 3) for name, value in parts.items()},
        "estimated_parts_s": {name: round(value, 3) for name, value in zip(parts, estimates, strict=True)},
        "completions": texts,
        "tokens_a_completion": round(float(np.concatenate(tokens).mean()), 2),
        "completions_per_s": round(texts / parts["completions"], 1),
        "said": [line for line in words.splitlines() if line.startswith(("weights:", "memory", "peak"))],
    }


def inputs(folder: Path, model: str, batch_tokens: int) -> Sweep:
    """Model, judges, texts and configurations, nothing fetched."""
    from lib.demo.tiny import make_tokenizer

    config = config_of(model)
    for name in ("model", *JUDGES):  # of one tokenizer: judges read as many tokens as were written
        make_tokenizer(LETTERS).save_pretrained(folder / name)
        words = whole_vocabulary(folder / name, config.vocab_size)
    save_random(gated_shape(config), config, folder / "model")
    for seed, name in enumerate(JUDGES):
        random_judge(folder / name, config.vocab_size, seed)
    free()
    dice, known = np.random.default_rng(0), np.array(words)
    for name, rows, tokens in (
        ("general", GENERAL, GENERAL_TOKENS),
        ("prompts", PROMPTS, PROMPT_TOKENS),
        ("text", 1, WINDOWS * WINDOW),
    ):
        texts = ["".join(dice.choice(known, tokens)) for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    judges = ", ".join(f"{{id: {folder}/{name}, dtype: float32}}" for name in JUDGES)
    values = {"folder": folder, "general": GENERAL, "general_tokens": GENERAL_TOKENS, "prompts": PROMPTS}
    values |= {"sizes": list(SIZES), "neurons": SIZES[-1], "window": WINDOW, "samples": SAMPLES, "new": NEW}
    values |= {"judges": judges, "batch_tokens": batch_tokens}
    for name, text in (("attribution", ATTRIBUTION), ("selection", SELECTION), ("sweep", SWEEP)):
        (folder / f"{name}.yaml").write_text(text.format(**values))
    found = load(folder / "sweep.yaml")
    assert isinstance(found, Sweep)
    return found


def random_judge(folder: Path, vocabulary: int, seed: int) -> None:
    """BERT's base, but for a vocabulary as wide as the model's."""
    from transformers import BertConfig, BertForSequenceClassification

    layers, hidden, inner, heads = JUDGE
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        id2label={0: "toxic"},
        label2id={"toxic": 0},
        dtype="float32",
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        judge = BertForSequenceClassification(config)
    judge.save_pretrained(folder)


RUNGS: dict[str, Callable[[str, int], Result]] = {"sweep-job": job}
