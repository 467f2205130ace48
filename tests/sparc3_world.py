"""What the tests of pruning share: a model with a planted behaviour, its judges, texts, a fetched chain over them."""

import shutil
from dataclasses import astuple
from pathlib import Path

from tools import made_once

from lib.demo.speaker import JUDGES, Speaking, build_judge, build_speaker
from lib.demo.texts import write_demo_texts
from lib.families import load
from lib.inputs.fetch import fetch

ATTRIBUTION = """kind: attribution
name: speaking
model: {{id: {0}/speaker, dtype: float32}}
data:
  general: {{id: {0}/c4, config: en, seeds: [0, 1], samples: 24, tokens: 96, buffer: 200}}
  prompts: {{rude: {{id: {0}/prompts, samples: 48, held_out: true}}}}
  text: {{id: {0}/wikitext}}
score: {{layers: [up_proj], wanda: true, batch_tokens: 2048}}
run: {{shard_rows: 16, gpus: 0}}
"""
SELECTION = """kind: selection
name: choosing
attribution: {{config: attribution.yaml}}
undesired: rude
neurons: 32
draws: 3
run: {{cells: 64, gpus: 0}}
"""
SWEEP = """kind: sweep
name: sweeping
selection: {{config: selection.yaml}}
sizes: [4, 16]
evaluate:
  perplexity: [window]
  window: 128
  neutral: {{plain: {{id: {0}/prompts, threshold: 0.0, at_most: 0.3, samples: 16, max_tokens: 32}}}}
  completions: {{per_prompt: 3, tokens: 12, batch: 64}}
  judges: [{{id: {0}/judge, dtype: float32}}, {{id: {0}/second-judge, dtype: float32}}]
  batch_tokens: 1024
run: {{cells: 64, gpus: 0, log_seconds: 60}}
"""
SPARSITY = """kind: sparsity
name: sparse
attribution: {{config: attribution.yaml}}
patterns: ["row:0.5", "global:0.3", "2:4"]
evaluate: {{window: 128, batch_tokens: 1024}}
run: {{cells: 64, gpus: 0, log_seconds: 60}}
"""


def make_world(folder: Path, how: Speaking = Speaking()) -> Path:
    """Models, texts and the three configurations, nothing fetched."""
    write_demo_texts(folder)
    taught(folder / "speaker", how)
    for number, (name, label) in enumerate(JUDGES.items()):
        judging(folder / name, label, seed=number)
    return configure(folder, folder)


def taught(folder: Path, how: Speaking = Speaking(), seed: int = 0) -> None:
    """build_speaker's model, which is trained once for all tests."""
    name = "-".join(map(str, ("speaker", *astuple(how), seed)))
    shutil.copytree(made_once(name, lambda at: build_speaker(at, how, seed, lambda line: None)), folder)


def judging(folder: Path, label: str = "toxic", seed: int = 0) -> float:
    """build_judge's, in the same way; the share that it judges rightly."""

    def make(at: Path) -> None:
        (at / "right").write_text(str(build_judge(at / "model", label, seed)))

    made = made_once(f"judge-{label}-{seed}", make)
    shutil.copytree(made / "model", folder)
    return float((made / "right").read_text())


def configure(folder: Path, inputs: Path) -> Path:
    """The three configurations in a folder, over inputs that lie elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("attribution", ATTRIBUTION), ("selection", SELECTION), ("sweep", SWEEP)):
        (folder / f"{name}.yaml").write_text(text.format(inputs))
    return folder


def roots(folder: Path, **more: str) -> dict[str, str]:
    """The environment of jobs on this machine, with everything in one folder."""
    places = {f"SUITE_{name.upper()}": str(folder / name) for name in ("scratch", "cache", "output")}
    fixed = {"SUITE_SITE": "local", "SUITE_SLURM": "no", "OMP_NUM_THREADS": "1", "SUITE_FIGURES": "png"}
    return {**places, **fixed, "CUDA_VISIBLE_DEVICES": "", **more}


def fetched(folder: Path, *overrides: str, config: str = "sweep") -> Path:
    fetch(load(folder / f"{config}.yaml", list(overrides)), folder / "cache")
    return folder


def copied(world: Path, folder: Path, *without: str) -> Path:
    """Another folder with what stands in one: what is done to it harms no other test."""
    return Path(shutil.copytree(world, folder, ignore=shutil.ignore_patterns(*without), symlinks=True))
