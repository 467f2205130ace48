"""A family of small stages, put into a copy of the repository by what the README says that one takes: its folder,
configurations, a job, a batch file, and a line in the registry."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
from conftest import ROOT, Slurm
from tools import copy_of_the_repository

STAGES = ("write", "teach", "judge", "count")


def repository_with_chain(root: Path) -> Path:
    copy_of_the_repository(root)
    (root / "lib" / "chain").mkdir()
    for name in ("experiment.py", "kernel.py"):
        shutil.copy2(ROOT / "tests" / "chain" / name, root / "lib" / "chain" / name)
    (root / "lib" / "chain" / "__init__.py").touch()
    batch = (root / "slurm" / "compute_lls.sbatch").read_text()
    for name, text in (("run_chain", batch), ("run_judge", re.sub("#SBATCH --.*(gpu|constraint).*\n", "", batch))):
        shutil.copy2(ROOT / "tests" / "chain" / "job.py", root / "jobs" / f"{name}.py")
        (root / "slurm" / f"{name}.sbatch").write_text(text.replace("compute_lls", name))
    registry = root / "lib" / "families.py"
    kinds = "".join(f'"{stage}": "lib.chain.experiment:{stage.title()}", ' for stage in STAGES)
    before = registry.read_text()
    assert before.count("KINDS = {") == 1
    registry.write_text(before.replace("KINDS = {", f"KINDS = {{{kinds}"))
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
