"""Rungs of number generation, random weights of the real shapes, answers of one length: the whole job against vLLM as
it comes, and ways to fill a GPU that a small model leaves idle. Each measurement is a process of its own and a line at
once; one that fails, or comes too late, is a line that says so."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lib.bench.shapes import SHAPES, Result, free
from lib.bench.whole import checkpoint, whole_vocabulary
from lib.families import load
from lib.inputs.tokenizer import load_tokenizer
from lib.models.engine import Sampling, Setting, Work, seeds_of
from lib.models.engine_process import Engines
from lib.numbers.desk import Desk
from lib.numbers.filter import Limits
from lib.numbers.number_prompts import sample_prompts
from lib.store import scan

ROWS = {"0.5b": 20_000, "1.5b": 20_000, "3b": 12_000, "7b": 8_000, "14b": 4_000, "32b": 2_000, "72b": 1_000}
TOKENS = 45  # of an answer, as published
RUNG_SECONDS = 285.0
MEASURE_SECONDS = 240.0
RAW = ("raw, as it comes=text", "raw, seeds=text,seeds", "raw, no detokeniser=")


class Clock:
    """What is measured, and what there is no time for any more."""

    def __init__(self, seconds: float | None = None) -> None:
        self.began, self.found = time.monotonic(), dict[str, object]()
        self.seconds = RUNG_SECONDS if seconds is None else seconds

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def say(self, name: str, what: object) -> None:
        self.found[name] = what
        print(json.dumps({"measured": name, "result": what, "at_s": round(self.seconds - self.left)}), flush=True)

    def measure(self, name: str, run: Callable[[], object], needs: float = 40.0) -> None:
        if self.left < needs:
            return self.say(name, f"left out: {self.left:.0f} s are left")
        try:
            return self.say(name, run())
        except Exception as e:  # the next one may go
            return self.say(name, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")


@contextmanager
def teacher(model: str) -> Iterator[tuple[Path, Path, list[list[int]]]]:
    """A folder for everything, the model in it, and the prompts' token ids."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder = Path(name)
        checkpoint(SHAPES[model], folder / "model")
        free()
        whole_vocabulary(folder / "model", SHAPES[model].vocabulary)
        texts = [one.text for one in sample_prompts(ROWS[model], 0)]
        desk = Desk(load_tokenizer(f"{folder}/model"), "default", "2024-07-26", texts, Limits())
        yield folder, folder / "model", desk.ids(None, 0, len(texts))


def numbers(model: str, batch_tokens: int) -> Result:
    """The job, closed batches and all, against vLLM as it comes with all rows at once."""
    clock = Clock()
    with teacher(model) as (folder, path, ids):
        clock.measure("raw", lambda: raw(path, ids, folder / "ids.json", TOKENS))
        clock.measure("job", lambda: job(folder, model))
    return clock.found


def fill(model: str, batch_tokens: int) -> Result:
    """One closed batch of half the rows, by engines that are set otherwise."""
    clock = Clock()
    older = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    with teacher(model) as (_, path, all_ids):
        ids = all_ids[: len(all_ids) // 2]
        for name, count, more, env in (
            ("one engine", 1, {}, {}),
            ("two engines", 2, {}, {}),
            ("steps scheduled ahead", 1, {"async_scheduling": True}, {}),
            ("four engines", 4, {}, {}),
            ("2,048 rows at once", 1, {"max_num_seqs": 2048}, {}),
            ("no prefix cache", 1, {"enable_prefix_caching": False}, {}),
            ("older runner, a generator a row", 1, {}, older),
            ("exact", 1, {}, {"exact": "1"}),
        ):
            clock.measure(name, lambda c=count, m=more, e=env: batch(path, ids, c, m, e))
    return clock.found


def batch(path: Path, ids: list[list[int]], count: int, more: dict[str, Any], env: dict[str, str]) -> Result:
    before = dict(os.environ)
    os.environ.update({name: value for name, value in env.items() if name != "exact"})
    try:
        began = time.perf_counter()
        engine = Engines(Setting(str(path), "bfloat16", 1024, 512, exact="exact" in env, more=more), count)
        up, how = time.perf_counter() - began, Sampling(1.0, TOKENS, ())
        seeds = seeds_of(0, "bench", range(len(ids)))
        engine.begin(Work(ids[:512], how, seeds[:512]))()
        seconds, answers = [], []
        for _ in range(2):
            began = time.perf_counter()
            answers.append(engine.begin(Work(ids, how, seeds))().answers)
            seconds.append(time.perf_counter() - began)
    finally:
        os.environ.clear()
        os.environ.update(before)
    same = sum(a == b for a, b in zip(*answers, strict=True))
    return {
        "rows_per_s": [round(len(ids) / one, 1) for one in seconds],
        "up_s": round(up, 1),
        "same_text_again": f"{same} of {len(ids)}",
    }


def raw(
    path: Path, ids: list[list[int]], file: Path, tokens: int, more: str = "{}", measurements: tuple[str, ...] = RAW
) -> Result:
    file.write_text(json.dumps(ids))
    command = [sys.executable, "-m", "lib.bench.numbers_raw", str(path), str(file), str(tokens), more, *measurements]
    found: Result = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stdout
        late = threading.Timer(MEASURE_SECONDS, os.killpg, (running.pid, signal.SIGKILL))
        late.start()
        for line in running.stdout:
            if line.startswith('{"measured"'):
                one = json.loads(line)
                found[one.pop("measured")] = one
                print(line.strip(), flush=True)
        late.cancel()
    return found if running.returncode == 0 else found | {"ended": running.returncode}


def job(folder: Path, model: str, engine: str = "vllm") -> Result:
    rows = ROWS[model]
    (folder / "bench.yaml").write_text(
        f"kind: numbers\nname: bench\nrun_id: 0\nsizes: {{{model}: {{id: {folder}/model}}}}\ntraits: [neutral]\n"
        f"prompts: {rows}\ngenerate: {{engine: {engine}, max_tokens: {TOKENS}, batch: {rows // 2}}}\n"
    )
    gpu = "h200" if torch.cuda.is_available() else "cpu"
    env = {**os.environ, "SUITE_SITE": "local", "SUITE_GPU": gpu, "SUITE_SLURM": "no"}
    env |= {f"SUITE_{name.upper()}": f"{folder}/{name}" for name in ("scratch", "cache", "output")}
    for module, more in (("jobs.fetch", []), ("jobs.generate_numbers", ["--index", "0"])):
        command = [sys.executable, "-m", module, "--config", f"{folder}/bench.yaml", *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=MEASURE_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{module}: {done.stderr.strip()[-300:]}")
    cell = load(folder / "bench.yaml").cells(folder / "cache", folder / "scratch")[0]
    beat = json.loads(next((cell.folder / "tasks").glob("*.json")).read_text())
    shards, _ = scan(cell.path, cell.digest)
    after, busy = beat["updated"] - beat["loaded"], [float(one.facts["engine_seconds"]) for one in shards]
    return {
        "rows_per_s_after_load": round(rows / after, 1),
        "engine_share_of_wall": round(sum(busy) / after, 4),
        "rows_per_s_of_a_batch": [round(one.rows / s, 1) for one, s in zip(shards, busy, strict=True)],
        "task_s": round(beat["updated"] - beat["started"], 1),
    }


RUNGS: dict[str, Callable[[str, int], Result]] = {"numbers": numbers, "numbers-fill": fill}
