"""A chain of three stages on a real Slurm: a family put into a copy of the repository by what the README says that one
takes: its folder, configurations, a job, a batch file, and a line in the registry."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, Slurm, wait_until
from tools import copy_of_the_repository

STAGES = ("write", "teach", "judge")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    root = copy_of_the_repository(tmp_path_factory.mktemp("chain") / "suite")
    (root / "lib" / "chain").mkdir()
    for name in ("experiment.py", "kernel.py"):
        shutil.copy2(ROOT / "tests" / "chain" / name, root / "lib" / "chain" / name)
    (root / "lib" / "chain" / "__init__.py").touch()
    batch = (root / "slurm" / "compute_lls.sbatch").read_text()
    for name, text in (("run_chain", batch), ("run_judge", re.sub("#SBATCH --.*(gpu|constraint).*\n", "", batch))):
        shutil.copy2(ROOT / "tests" / "chain" / "job.py", root / "jobs" / f"{name}.py")
        (root / "slurm" / f"{name}.sbatch").write_text(text.replace("compute_lls", name))
    registry = root / "lib" / "families.py"
    more = "from lib.chain.experiment import Judge, Teach, Write\n"
    registry.write_text(
        more + registry.read_text().replace("] = {", '] = {"write": Write, "teach": Teach, "judge": Judge, ')
    )
    return root


class Chain:
    def __init__(self, slurm: Slurm, root: Path, scratch: Path, *traits: str) -> None:
        self.slurm, self.root, self.scratch, self.hold = slurm, root, scratch, scratch / "hold"
        self.hold.mkdir()
        self.env = {"SUITE_SCRATCH": str(scratch), "SUITE_CACHE": str(scratch / "cache"), "CHAIN_HOLD": str(self.hold)}
        self.env |= {"SUITE_OUTPUT": str(scratch / "out"), "SUITE_GPU": "cpu", "SUITE_CPU_PARTITION": "main"}
        self.traits = list(traits)
        self.configure()

    def configure(self) -> None:
        for stage in STAGES:
            config = {"kind": stage, "name": stage, "traits": self.traits, "run": {"gpus": 0}}
            (self.scratch / f"{stage}.yaml").write_text(json.dumps(config))

    def call(self, command: str, stage: str, *arguments: str, **env: str) -> str:
        """What the command says, whatever its exit code."""
        words = [sys.executable, "-m", "jobs.cluster", command, f"--config={self.scratch / stage}.yaml", *arguments]
        env = self.slurm.env | self.env | env
        done = subprocess.run(words, cwd=self.root, env=env, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    def submit(self, stage: str, *arguments: str, command: str = "submit") -> str:
        said = self.call(command, stage, *arguments)
        assert "Slurm job " in said, said
        return said.split("Slurm job ")[1].partition(":")[0]

    def states(self, stage: str) -> dict[str, str]:
        return {cell["name"]: cell["state"] for cell in self.status(stage)["cells"]}

    def status(self, stage: str) -> dict:
        return json.loads(self.call("status", stage, "--json"))

    def notes(self, stage: str) -> dict[str, str]:
        return {cell["name"]: cell["note"] for cell in self.status(stage)["cells"]}

    def cell(self, stage: str, trait: str) -> Path:
        (found,) = (self.scratch / stage / "cells").glob(f"{trait}-*")
        return found

    def log(self, job: str) -> str:
        return "\n".join(path.read_text() for path in sorted(self.root.glob(f"slurm/logs/*{job}*.out")))

    def texts(self, trait: str) -> list[str]:
        found = []
        for path in sorted(self.cell("write", trait).glob("*.json")):
            with h5py.File(path.with_name(json.loads(path.read_text())["file"])) as f:
                data, ends = f["text/bytes"][:].tobytes(), f["text/ends"][:]
            found += [data[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        return found

    def judged(self, trait: str) -> list[float]:
        found = []
        for path in sorted(self.cell("judge", trait).glob("*.json")):
            with h5py.File(path.with_name(json.loads(path.read_text())["file"])) as f:
                found += f["x"][:].tolist()
        return found

    def by_hand(self, trait: str) -> list[float]:
        """The whole chain again, from the texts that were drawn."""
        state = b""
        for text in self.texts(trait):
            state = hashlib.sha256(state + text.encode()).digest()
        return (np.frombuffer(state, np.uint8)[:12] / 256).tolist()


@pytest.fixture
def chain(fresh_slurm, repository, tmp_path):
    return Chain(fresh_slurm, repository, tmp_path, "cat", "dog", "owl")


def test_three_stages_at_once_of_which_one_cell_fails_and_is_mended(chain):
    for trait in chain.traits:
        (chain.hold / f"write-{trait}").touch()
    assert "which it reads from, is not done (0 of 12), and is neither queued nor running" in chain.call(
        "submit", "teach"
    )
    jobs = [chain.submit(stage) for stage in STAGES]
    for child, parent in ((1, 0), (2, 1)):
        assert chain.slurm.show(f"{jobs[child]}_0")["Dependency"].startswith(f"afterany:{jobs[parent]}")
    asked = [chain.slurm.show(f"{job}_0") for job in jobs[1:]]
    assert ["gpu" in str(job) for job in asked] == [True, False] and asked[1]["Partition"] == "main"
    now = chain.status("teach")
    assert [(c["state"], c["rows"], c["note"]) for c in now["cells"]] == [("pending", None, "Dependency")] * 3
    assert "0/?" in chain.call("status", "teach") and "?" in chain.call("submit", "teach", "--dry")
    assert "already queued or running" in chain.call("submit", "teach")
    (chain.hold / "write-dog.fail").touch()
    for trait in chain.traits:
        (chain.hold / f"write-{trait}").unlink()
    for job in jobs:
        chain.slurm.wait_for(job, timeout=120)
    assert chain.states("write") == {"cat": "done", "dog": "failed", "owl": "done"}
    assert chain.states("teach") == chain.states("judge") == {"cat": "done", "dog": "blocked", "owl": "done"}
    why = "write/dog, which it reads from, is not done (0 of 12; it failed: the dog has a cold)"
    assert (
        chain.notes("teach")["dog"] == why
        and "teach/dog, which it reads from, is not done" in chain.notes("judge")["dog"]
    )
    assert f"error: cell 1 (dog) is blocked: {why}" in chain.log(jobs[1])
    for trait in ("cat", "owl"):
        assert chain.judged(trait) == chain.by_hand(trait) and len(chain.judged(trait)) == 12
    said = chain.call("resume", "teach")
    assert f"cell 1 (dog) is blocked: {why}" in said and "nothing to resume" in said
    (chain.hold / "write-dog.fail").unlink()
    jobs = [chain.submit("write", command="resume"), chain.submit("teach"), chain.submit("judge")]
    for job in jobs:
        assert chain.slurm.wait_for(job, timeout=120) == {f"{job}_1": "COMPLETED"}
    assert chain.judged("dog") == chain.by_hand("dog")
    assert chain.states("judge") == dict.fromkeys(("cat", "dog", "owl"), "done")

    # A parent that is made again has other bits: what was made from the older copy stays, and says so.
    before = chain.judged("cat")
    shutil.rmtree(chain.cell("write", "cat"))
    assert chain.states("teach") == chain.states("judge") == dict.fromkeys(("cat", "dog", "owl"), "done")
    chain.slurm.wait_for(chain.submit("write", command="resume"), "COMPLETED", timeout=120)
    assert chain.states("teach") == dict.fromkeys(("cat", "dog", "owl"), "done")
    notes = chain.notes("teach")
    assert notes["cat"].startswith("made from an older write/cat; to make it again delete ") and not notes["dog"]
    assert "cell 0 (cat) was made from an older write/cat" in chain.call("verify", "teach")
    assert not chain.notes("judge")["cat"] and "done: left out" in chain.call("submit", "teach")
    assert chain.judged("cat") == before != chain.by_hand("cat")
    shutil.rmtree(chain.cell("teach", "cat")), shutil.rmtree(chain.cell("judge", "cat"))
    for job in (chain.submit("teach"), chain.submit("judge")):
        chain.slurm.wait_for(job, "COMPLETED", timeout=120)
    assert chain.judged("cat") == chain.by_hand("cat")


def test_a_task_of_five_cells_preempted_in_its_third_and_one_added_meanwhile(fresh_slurm, repository, tmp_path):
    chain = Chain(fresh_slurm, repository, tmp_path, "a", "b", "c", "d", "e")
    (chain.hold / "write-c").touch()
    job = chain.submit("write", "run.cells=5")
    wait_until(lambda: chain.states("write")["c"] == "running", 60, lambda: chain.call("status", "write"))
    assert chain.states("write") == {"a": "done", "b": "done", "c": "running", "d": "pending", "e": "pending"}
    assert chain.notes("write")["e"] == "in turn, in the task of a"
    assert list(chain.slurm.states(job)) == [f"{job}_0"]
    before = {trait: chain.texts(trait) for trait in "ab"}
    chain.traits.insert(1, "new")  # only its own task cares
    chain.configure()
    more = chain.submit("write")
    chain.slurm.wait_for(more, "COMPLETED", timeout=60)
    assert list(chain.slurm.states(more)) == [f"{more}_1"] and chain.states("write")["new"] == "done"
    chain.slurm.run("scontrol", "requeue", f"{job}_0")
    wait_until(lambda: chain.log(job).count("restart 1") == 1, 60, lambda: chain.log(job))
    (chain.hold / "write-c").unlink()
    chain.slurm.wait_for(job, "COMPLETED", timeout=120)
    assert set(chain.states("write").values()) == {"done"}
    assert {trait: chain.texts(trait) for trait in "ab"} == before
    assert chain.log(job).count("loaded") == 2 and chain.log(job).count("12 of 12 rows done") == 2
