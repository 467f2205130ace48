"""`make doctor GPU=1`: before the first large job, one of a minute asks a node with a GPU; without Slurm, this machine.

What runs there is jobs.probe --answer FOLDER (lib.bench.probe): it reads a file of FOLDER, which lies on scratch, and
leaves its answer beside it."""

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lib.base.atomic import read_json, write_bytes
from lib.base.errors import UserError
from lib.cluster.gpus import SEEN
from lib.cluster.request import Line, ask
from lib.run.site import ROOT, Site

DATA, ANSWER = "data", "answer.json"
DATA_BYTES = 64 * 2**20
POLL, SLOWEST_POLL = 1.0, 30.0  # seconds between two looks at the queue, longer each time
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "RESIZING", "SIGNALING")


def show(site: Site) -> int:
    """Print the lines of a node with a GPU and keep its driver's version for set-up; 1 when a line says FAIL."""
    folder = site.scratch / f".probe-{secrets.token_hex(6)}"
    try:
        write_bytes(folder / DATA, secrets.token_bytes(DATA_BYTES))
        lines = list(_asked(site, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for line in lines:
        print(line.text, flush=True)
    return int(any(line.level == "FAIL" for line in lines))


def _asked(site: Site, folder: Path) -> Iterator[Line]:
    failure = _by_slurm(site, folder) if site.env.get("SUITE_SLURM") != "no" else _here(site, folder)
    answer = read_json(folder / ANSWER)
    if not isinstance(answer, dict):
        yield failure
        return
    if answer["driver"]:
        SEEN.write_text(f"{answer['driver']}\n")
    for line in answer["lines"]:
        yield Line(**line)


def _here(site: Site, folder: Path) -> Line:
    """What is said where there is no answer."""
    command = [sys.executable, "-m", "jobs.probe", "--answer", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=site.env, capture_output=True, text=True, check=False)
    said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return Line(
        "FAIL", "gpu", f"the probe ended without an answer: {said}", f"python -m jobs.probe --answer {site.scratch}"
    )


def _by_slurm(site: Site, folder: Path) -> Line:
    good, out = ask(site.env, "sbatch", "--parsable", "slurm/probe.sbatch", str(folder), cwd=ROOT)
    if not good:
        return Line("FAIL", "gpu", f"refused: {out.removeprefix('sbatch: ')}", "the FAIL lines below, then again")
    job = out.strip().partition(";")[0]
    print(f"asking a node by Slurm job {job}; Ctrl-C gives it up", file=sys.stderr, flush=True)
    try:
        ended = _wait(site, job)
    except BaseException:
        ask(site.env, "scancel", job)
        raise
    log = ROOT / "slurm" / "logs" / f"probe-{job}_0.out"
    said = ""
    with suppress(OSError, IndexError):
        said = f": {log.read_text(errors='replace').splitlines()[-1]}"
    return Line("FAIL", "gpu", f"job {job} is {ended} and left no answer{said}", f"see {log}")


def _wait(site: Site, job: str) -> str:
    """Until the job has ended, saying what it waits for; its state."""
    told, pause = "", POLL
    while True:
        good, out = ask(site.env, "squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T %r")
        if good or "Invalid job id" in out:
            state, _, reason = (out.splitlines() if good and out.strip() else ["GONE"])[0].partition(" ")
            if state not in LIVE:
                return state
            if "held" in reason.lower():
                raise UserError(f"job {job} is held ({reason}) and was cancelled; see `scontrol show job {job}`")
            if state == "PENDING" and reason not in (told, "None"):
                told = reason
                print(f"job {job} waits: {reason}", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(pause * 1.1, SLOWEST_POLL)
