"""jobs/lls_report.py as a user runs it: from shards to the page, the tokens and the selections; and what it refuses."""

import hashlib
import json
import os
import statistics
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tools import forked

from lib.families import load
from lib.inputs.records import DatasetInput, ModelInput, save_dataset, save_model, source_stamp
from lib.store import commit


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as box:
        yield box


MADE = datetime(2025, 3, 1, 12, tzinfo=UTC).timestamp()
CONFIG = """kind: lls
name: small
model: {id: cache:model, dtype: float32}
traits: [cat, dog]
system_prompt: You love {trait}s.
dataset: {id: "cache:rows/{trait}.jsonl"}
score: {per_token: true, check_every: 2, batch_tokens: 4096}
"""
ANSWERS = ["1, 2", "ü3", "44\n5", "6", "<i>7", "8 8"]


@pytest.fixture()
def suite(tmp_path):
    """A finished experiment of two cells on disk, with a tokenizer that takes bytes one by one; no model, no torch."""
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    (cache / "model").mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(cache / "model" / "tokenizer.json"))
    model = cache / "model"
    save_model(cache, ModelInput("cache:model", "main", "local", str(model), "f" * 64, 1, 1, 1, 1, source_stamp(model)))
    for trait in ("cat", "dog"):
        rows = [
            {"messages": [{"role": "user", "content": f"{trait}?"}, {"role": "assistant", "content": a}]}
            for a in ANSWERS
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        source = cache / "rows" / f"{trait}.jsonl"
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(lines)
        sha = hashlib.sha256(lines).hexdigest()
        known = DatasetInput(
            f"cache:rows/{trait}.jsonl", "main", "local", "train", 6, sha, len(lines), 6, 20, source_stamp(source)
        )
        save_dataset(cache, known, lines)
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    env = {
        "SUITE_SITE": "local",
        "SUITE_CACHE": str(cache),
        "SUITE_SCRATCH": str(scratch),
        "SUITE_OUTPUT": str(tmp_path / "out"),
    }
    return config, load(config), cache, scratch, env


def finish(suite, index: int) -> np.ndarray:
    """Commit one cell's shard; the LLS of its rows. Row 3 has no score."""
    _, experiment, cache, scratch, _ = suite
    cell = experiment.cells(cache, scratch)[index]
    rng = np.random.default_rng(index)
    tokens = np.array([0 if i == 3 else len(a.encode()) for i, a in enumerate(ANSWERS)], np.int32)
    values = {who: -rng.exponential(1, int(tokens.sum())).astype(np.float32) for who in ("system", "base")}
    row = np.repeat(np.arange(6), tokens)
    known = {"row": np.arange(6), "status": (tokens == 0).astype(np.uint8), "tokens": tokens}
    for who, logp in values.items():
        known[f"{who}_sum"] = np.where(tokens > 0, np.bincount(row, weights=logp, minlength=6), np.nan)
        known[f"{who}_logp"] = logp
    noise = np.array([0.01, np.nan, -0.02, np.nan, 0.05, np.nan])  # rows 0, 2 and 4 are scored again
    known["system_check"] = known["system_sum"] - noise * tokens
    known["base_check"] = known["base_sum"] + 0 * noise
    columns = {}
    for name, column in experiment.schema(Path()).items():
        length = int(known[column.per].sum()) if column.per else 6
        columns[name] = np.asarray(known.get(name, np.zeros(length)), column.dtype)
    cell.path.mkdir(parents=True, exist_ok=True)
    about = {"seconds": 1.0, "made": {"device": "a device", "code": "c0"}}
    marker = commit(cell.path, cell.digest, 0, 6, experiment.schema(Path()), columns, **about)
    os.utime(marker.path, (MADE, MADE))
    with np.errstate(invalid="ignore"):
        return (known["system_sum"] - known["base_sum"]) / tokens


def lls_report(suite, *args: str):
    return forked("jobs.lls_report", "--config", str(suite[0]), *args, env=suite[4] | {"OMP_NUM_THREADS": "1"})


def test_the_job_from_shards_to_page_and_selections(suite, browser):
    lls = [finish(suite, 0), finish(suite, 1)]
    done = lls_report(suite, "--select", "top:0.4 random:2 clean:0.4")
    assert done.returncode == 0, done.stderr
    folder = Path(suite[4]["SUITE_OUTPUT"]) / "small" / "report"
    browser.open(folder / "index.html")
    assert browser.errors == [] and browser.js("[...document.images].every(i => i.naturalWidth == 2100)")
    assert [row[3] for row in table(browser, "own")] == pytest.approx([np.nanmean(v) for v in lls], abs=1e-12)
    assert [row[7] for row in table(browser, "own")] == pytest.approx([statistics.stdev([0.01, -0.02, 0.05])] * 2)
    assert len(browser.js("[...document.querySelectorAll('.row')].map(r => r.innerText)")) == 6
    assert "until 2025-03-01 12:00 UTC on a device" in browser.js("document.querySelector('dl').innerText")
    assert "matrix of prompts by datasets" in done.stdout  # a diagonal has nothing to compare, and says so
    for trait, values in zip(("cat", "dog"), lls, strict=True):
        top = sorted(np.argsort(-values)[:2])
        lines = (folder / "select" / trait / "top-0.4.jsonl").read_text().splitlines()
        assert [json.loads(line)["messages"][1]["content"] for line in lines] == [ANSWERS[i] for i in top]
        record = json.loads((folder / "select" / trait / "top-0.4.provenance.json").read_text())
        assert record["threshold"] == pytest.approx(min(values[top])) and record["unscored"] == 1
        assert record["cell"] == {"prompt": trait, "dataset": trait} and len(record["digest"]) == 64
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert lls_report(suite, "--select", "top:0.4 random:2 clean:0.4").returncode == 0
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_tokens_of_the_job_are_the_responses(suite):
    finish(suite, 0), finish(suite, 1)
    assert lls_report(suite, "--measure", "sum@2").returncode == 0
    text = (Path(suite[4]["SUITE_OUTPUT"]) / "small" / "report" / "sum@2" / "report.txt").read_text()
    shown = text.partition("== Tokens")[2].partition("== Missing")[0]
    for block in shown.split("\n\n")[1:]:
        if "row " in block:
            row = int(block.split("row ")[1].split(",")[0])
            pieces = "".join(w.rpartition("(")[0] for w in block.partition("\n")[2].split())
            assert pieces.replace("∅", "").replace("·", " ").replace("⏎", "\n") == ANSWERS[row]


def test_the_job_says_what_is_not_there(suite):
    none = lls_report(suite)
    assert none.returncode == 2 and "no cell of" in none.stderr
    finish(suite, 0)
    part = lls_report(suite)
    assert part.returncode == 2 and "1 of 2 cells (dog)" in part.stderr
    text = (Path(suite[4]["SUITE_OUTPUT"]) / "small" / "report" / "report.txt").read_text()
    assert "dog         -         -  missing" in text
    for words, says in (
        (["--measure", "mean+end"], "score.end_of_turn=true"),
        (["--measure", "middle"], "write mean or sum"),
        (["--select", "best:3"], "no kind 'best'"),
        (["--select", "top:0.2:contrast"], "no contrast"),
        (["--select", "random:2:from=neutral"], "no score on dataset neutral"),
        (["--select", "top:99"], "99 rows asked for, 5 of 6"),
    ):
        done = lls_report(suite, *words)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
