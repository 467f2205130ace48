"""The batch scripts on a real Slurm: arrays, warnings, preemption, limits, requeues, a dead node; status over it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, Slurm, slurm_logs, thaw, wait_until
from tools import forked, number_rows, tiny_model, write_rows

from lib.cluster.status import STATES
from lib.families import load
from lib.inputs.fetch import fetch
from lib.store import gaps, merge, scan

TRAITS = ["cat", "dog", "owl"]
ROWS = 48


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A fetched experiment of three cells, and its merged files from a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model")
    for i, trait in enumerate(TRAITS):
        write_rows(folder / f"{trait}.jsonl", number_rows(ROWS, i))
    (folder / "small.yaml").write_text(
        f"kind: lls\nname: small\nmodel: {{id: {folder}/model, dtype: float32}}\ntraits: [{', '.join(TRAITS)}]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/{{trait}}.jsonl'}}\n"
        "score: {batch_tokens: 2048, head_rows: 64, per_token: true, check_every: 0}\n"
        "run: {shard_rows: 1, gpus: 1, log_seconds: 1}\n"
    )
    fetch(load(folder / "small.yaml"), folder / "cache")
    return folder


class Run:
    """One experiment in a scratch of its own, on the Slurm of the tests."""

    def __init__(self, slurm: Slurm, inputs: Path, scratch: Path) -> None:
        self.slurm, self.config, self.scratch = slurm, inputs / "small.yaml", scratch
        roots = {"SUITE_SCRATCH": scratch, "SUITE_CACHE": inputs / "cache", "SUITE_OUTPUT": scratch / "outputs"}
        self.env = {**{k: str(v) for k, v in roots.items()}, "OMP_NUM_THREADS": "1", "SUITE_GPU": "cpu"}
        self.cells = load(self.config).cells(inputs / "cache", scratch)
        self.frozen: list[int] = []

    def make(self, target: str, *settings: str) -> str:
        return self.slurm.run("make", "-s", target, f"CONFIG={self.config}", *settings, cwd=ROOT, **self.env)

    def submit(self, array: str = "0-2", **settings: str) -> str:
        out = self.make("submit-lls", f"ARRAY={array}", *[f"{k}={v}" for k, v in settings.items()])
        return out.split()[2].rstrip(":")

    def sbatch(self, flags: list[str], *arguments: str) -> str:
        """As a user types it: the plain file, its #SBATCH lines and the site's SBATCH_* variables."""
        return self.slurm.sbatch(*flags, "slurm/compute_lls.sbatch", self.config, *arguments, cwd=ROOT, **self.env)

    def status(self) -> dict:
        done = subprocess.run(
            ["make", "-s", "status", f"CONFIG={self.config}", "JSON=1"],
            cwd=ROOT, env=self.slurm.env | self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return json.loads(done.stdout)

    def state(self, index: int) -> dict:
        return self.status()["cells"][index]

    def shards(self, index: int) -> int:
        return len(scan(self.cells[index].path, self.cells[index].digest)[0])

    def freeze(self, *indices: int) -> list[int]:
        """Stop each cell's process after its first shards: what follows depends on nobody's speed. Their ids."""
        found: dict[int, int] = {}

        def all_frozen() -> bool:
            for index in set(indices) - found.keys():
                if 1 <= self.shards(index) < ROWS:
                    beats = (self.scratch / "small" / "tasks").glob(f"{TRAITS[index]}-*.json")
                    found[index] = json.loads(max(beats, key=lambda path: path.stat().st_mtime).read_text())["pid"]
                    os.kill(found[index], signal.SIGSTOP)
            return len(found) == len(indices)

        wait_until(all_frozen, 60, lambda: f"only {found}\n{self.log(indices[0])}", every=0.02)
        self.frozen += found.values()
        return [found[index] for index in indices]

    def log(self, index: int) -> str:
        return "\n".join(path.read_text() for path in slurm_logs() if path.stem.endswith(f"_{index}"))

    def merged(self, index: int) -> bytes:
        experiment = load(self.config)
        return merge(self.cells[index], experiment.schema(Path()), experiment.science_json()).read_bytes()


@pytest.fixture
def run(fresh_slurm, inputs, tmp_path):
    one = Run(fresh_slurm, inputs, tmp_path)
    before = slurm_logs()
    yield one
    thaw(*one.frozen)
    fresh_slurm.clear()
    for path in slurm_logs() - before:
        path.unlink()


@pytest.fixture(scope="module")
def undisturbed(slurm, inputs, tmp_path_factory):
    """Merged bytes of each cell, computed without Slurm, in one shard."""
    one = Run(slurm, inputs, tmp_path_factory.mktemp("undisturbed"))
    for index in range(len(TRAITS)):
        arguments = ("--config", str(one.config), "--index", str(index), "run.shard_rows=1000")
        done = forked("jobs.compute_lls", *arguments, env=one.env | {"SUITE_SITE": "local", "SUITE_SLURM": "no"})
        assert done.returncode == 0, done.stderr
    return [one.merged(i) for i in range(len(TRAITS))]


def test_an_array_from_submission_to_export(run, undisturbed):
    said = run.make("submit-lls", "ARRAY=0-2%2")
    job = said.split()[2].rstrip(":")
    assert f"next: squeue -j {job}" in said and said.count("next: ") == 3
    frozen = run.freeze(0, 1)
    now = run.status()
    assert [cell["state"] for cell in now["cells"][:2]] == ["running"] * 2
    assert now["cells"][2]["state"] == "pending" and now["cells"][2]["note"] == "JobArrayTaskLimit"
    assert "already queued or running" in run.make("submit-lls", "ARRAY=0-2")
    thaw(*frozen)
    run.slurm.wait_for(job, "COMPLETED", timeout=120)
    assert [run.merged(i) for i in range(3)] == undisturbed
    run.slurm.sacct(job, rows=3)
    now = run.status()
    assert now["counts"] == dict.fromkeys(STATES, 0) | {"done": 3}
    account = run.slurm.run("sacct", "-nPX", "-j", f"{job}_1", "-o", "ElapsedRaw").strip()
    assert now["cells"][1]["elapsed_s"] == int(account) and now["cells"][1]["rows_per_s"] > 0
    table = run.make("export-lls")
    assert "dog" in table and (run.scratch / "outputs" / "small" / "dog" / "dog_numbers.jsonl").exists()
    assert "nothing to submit" in run.make("submit-lls", "ARRAY=0-2")
    assert f"{3 * ROWS} pieces hold, 0 do not, 0 rows are not done" in run.make("verify")


def restarts(run: Run, job: str, *indices: int) -> list[str]:
    return [run.slurm.show(f"{job}_{i}")["Restarts"] for i in indices]


def test_warned_requeued_or_preempted_a_task_comes_back_by_itself(run, undisturbed):
    """Three tasks of an array, one after the other: the warning requeues its task alone."""
    job = run.submit("0-2")
    warned, requeued, preempted = run.freeze(0, 1, 2)
    run.slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_0")
    thaw(warned, after=signal.SIGUSR1)
    wait_until(lambda: restarts(run, job, 0) == ["1"], 30, lambda: run.log(0))
    assert restarts(run, job, 0, 1, 2) == ["1", "0", "0"]
    run.slurm.run("scontrol", "requeue", f"{job}_1")
    thaw(requeued, after=signal.SIGTERM)
    node = run.slurm.show(f"{job}_2")["NodeList"]
    high = run.slurm.sbatch(
        "-p", "high", "-w", node, "--gpus-per-node=2", "--wrap", "sleep 2", "-o", "/dev/null", cwd=run.scratch
    )
    thaw(preempted, after=signal.SIGTERM)
    run.slurm.wait_for(high, "COMPLETED", timeout=60)
    run.slurm.wait_for(job, "COMPLETED", timeout=120)
    assert restarts(run, job, 0, 1, 2) == ["1", "1", "1"]
    log = run.log(0)
    assert "stopping after this shard" in log and f"requeue {job}_0" in log and "restart 1" in log
    assert [r["State"] for r in run.slurm.sacct(f"{job}_2", rows=2)] == ["PREEMPTED", "COMPLETED"]
    for index in (1, 2):
        assert "stopped by SIGTERM: finished shards are kept" in run.log(index)
    assert [run.merged(i) for i in range(3)] == undisturbed


def test_time_limits_with_and_without_warning(run, undisturbed):
    """Slurm looks at limits every 30 s. A limit less than the warning's 180 s ahead: it sends USR1, never TIMEOUT. One
    moved up to now: warning and TERM come together, and it is for the user to resume."""
    job = run.submit("1-2")
    warned, sudden = run.freeze(1, 2)
    for task, limit in ((1, "TimeLimit=2"), (2, "EndTime=now+1seconds")):
        command = ["scontrol", "update", f"jobid={job}_{task}", limit]
        subprocess.run(command, env=run.slurm.env, check=False, capture_output=True)  # exits with 1 although it does it
    thaw(warned, after=signal.SIGUSR1)
    wait_until(lambda: restarts(run, job, 1) == ["1"], 60, lambda: run.log(1))
    assert "the time limit is near" in run.log(1) and 1 <= run.shards(1) < ROWS
    thaw(sudden, after=signal.SIGTERM)
    run.slurm.wait_for(f"{job}_2", "TIMEOUT", timeout=90)
    run.slurm.sacct(f"{job}_2")
    state = run.state(2)
    assert state["state"] == "failed" and "TIMEOUT (sacct)" in state["note"] and 0 < state["done"] < ROWS
    said = run.make("resume", "SET=run.cells=3")
    assert "cells 0,2 in 1 task of small" in said  # 0 was never submitted, and 1 comes back by itself
    run.slurm.wait_for(said.split()[2].rstrip(":"), "COMPLETED", timeout=120)
    run.slurm.wait_for(f"{job}_1", "COMPLETED", timeout=120)
    assert "TIMEOUT" not in {r["State"] for r in run.slurm.sacct(f"{job}_1", rows=2)}
    assert [run.merged(i) for i in range(3)] == undisturbed


def test_a_dead_node_with_the_old_copy_still_writing(run, undisturbed):
    job = run.submit("0")
    old = run.freeze(0)[0]
    node = run.slurm.show(f"{job}_0")["NodeList"]
    run.slurm.kill_node(node)

    def attempts() -> set[str]:
        return {m.made.attempt for m in scan(run.cells[0].path, run.cells[0].digest)[0]}

    wait_until(lambda: len(attempts()) == 2, 90, lambda: run.log(0))
    thaw(old)  # from here both copies commit shards
    run.slurm.wait_for(job, "COMPLETED", timeout=180)
    wait_until(lambda: not Path(f"/proc/{old}").exists(), 60, "the old copy goes on")
    assert len(attempts()) == 2
    run.slurm.revive_node(node)
    assert not gaps(scan(run.cells[0].path, run.cells[0].digest, deep=True)[0], ROWS)
    assert run.merged(0) == undisturbed[0]


def test_cancel_ends_for_good_and_resume_submits_just_the_rest(run, undisturbed):
    job = run.submit("0-2%2")
    frozen = run.freeze(0, 1)
    assert job in run.make("cancel")
    thaw(*frozen, after=signal.SIGTERM)
    run.slurm.wait_for(job, "CANCELLED", timeout=60)
    time.sleep(3)
    assert set(run.slurm.states(job).values()) == {"CANCELLED"}  # our own exit does not requeue what a user cancelled
    states = [run.state(i)["state"] for i in range(3)]
    assert states == ["cancelled", "cancelled", "todo"]  # which is not failed; the last one had not begun
    again = run.make("resume", "SET=run.cells=3").split()[2].rstrip(":")
    run.slurm.wait_for(again, "COMPLETED", timeout=120)
    assert "nothing to resume" in run.make("resume")
    assert [run.merged(i) for i in range(3)] == undisturbed


def test_what_slurm_holds_is_named_with_its_release(run):
    run.slurm.run("scontrol", "update", "nodename=n[1-3]", "state=drain", "reason=test")
    try:
        job = run.submit("0-1")
        run.slurm.run("scontrol", "hold", f"{job}_1")
        assert [run.state(i)["state"] for i in range(3)] == ["pending", "held", "todo"]
        assert run.state(1)["note"].endswith(f"it waits for ever: scontrol release {job}_1")
        assert f"next: scontrol release {job}_1" in run.make("status")
        said = run.make("resume")  # what is held is not submitted twice
        assert f"cell 1 ({TRAITS[1]}) is held: " in said and "cells 2 of small" in said
        run.make("cancel")
    finally:
        run.slurm.run("scontrol", "update", "nodename=n[1-3]", "state=resume")


def test_a_failed_task_is_shown_with_its_reason_and_log(run, inputs):
    rows = inputs / "cache" / "inputs" / "datasets"
    target = next(rows.glob("*owl*")) / "rows.jsonl"
    whole = target.read_bytes()
    try:
        target.write_bytes(whole[:-5])
        job = run.submit("2")
        run.slurm.wait_for(job, "FAILED", timeout=60)
        state = run.state(2)
        assert state["state"] == "failed" and "is not the file that was fetched" in state["note"]
        assert run.slurm.sacct(job)[0]["ExitCode"] == "2:0"
        assert f"run `make fetch CONFIG={run.config}` again" in run.make("logs")
    finally:
        target.write_bytes(whole)


def test_a_killed_task_is_stale_until_resumed(run):
    job = run.submit("1")
    os.kill(run.freeze(1)[0], signal.SIGKILL)
    run.slurm.wait_for(job, "FAILED", timeout=60)
    run.slurm.sacct(job)
    state = run.state(1)
    assert state["state"] == "stale" and "FAILED (sacct); ended without a word" in state["note"]


def test_an_edited_config_does_not_leak_into_a_pending_job(run):
    text = run.config.read_text()
    try:
        job = run.submit("0")
        run.config.write_text(text.replace("You love", "You adore"))
        run.slurm.wait_for(job, "FAILED", timeout=60)
        assert "changed since this job was submitted" in run.log(0)
    finally:
        run.config.write_text(text)
