"""Submit, resume and cancel: sbatch where there is a Slurm, submitit's local executor where there is none."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.cluster import local, slurm
from lib.cluster.plan import plan as plan_of
from lib.cluster.plan import table
from lib.cluster.site import ROOT, Site
from lib.cluster.status import arrays_of, heartbeats, is_alive, live_tasks, missing_cells, run_folder, status
from lib.errors import UserError
from lib.experiments import Experiment
from lib.job import digest_of_all
from lib.store import Cell
from lib.store.atomic import HOST, write_json


@dataclass(frozen=True)
class Request:
    experiment: Experiment
    config: Path
    overrides: Sequence[str]
    site: Site
    cells: list[Cell]

    @property
    def spoken(self) -> str:
        """How this experiment is named to make."""
        return " ".join([f"CONFIG={self.config}", *([f'SET="{" ".join(self.overrides)}"'] if self.overrides else [])])


def sbatch_command(r: Request, indices: list[int], throttle: int) -> list[str]:
    """Flags win over SBATCH_* variables, which win over the script's #SBATCH lines."""
    array = f"{slurm.format_array(indices)}%{throttle}"
    flags = [f"--array={array}", f"--job-name={r.experiment.label}"]
    if r.experiment.run.gpus > 1:  # the batch file asks for one
        flags.append(f"--gpus-per-node={r.experiment.run.gpus}")
    return ["sbatch", "--parsable", *flags, *_script(r)]


def _script(r: Request) -> list[str]:
    """The batch script and what it is called with; --expect stops a task whose configuration or inputs were edited."""
    script = f"slurm/{r.experiment.job}.sbatch"
    return [script, str(r.config), f"--expect={digest_of_all(r.cells)[:16]}", *r.overrides]


def submit(r: Request, array: str, dry: bool) -> None:
    """Submit the cells of `array` that are neither done nor already queued."""
    wanted = slurm.parse_array(array, len(r.cells))
    if dry:
        return show(r, wanted, slurm.throttle_of(array) or r.site.throttle)
    queued = live_tasks(r.experiment.label, r.cells)
    busy = sorted(set(queued) & set(wanted))
    if busy:
        jobs = ", ".join(sorted({queued[i].array for i in busy}))
        print(f"cells {slurm.format_array(busy)} are already queued or running ({jobs}): left out")
    todo = {p.cell.index for p in plan_of(r.experiment, r.cells, r.site.cache, r.site.gpu) if p.rows}
    indices = [i for i in wanted if i in todo and i not in busy]
    finished = [i for i in wanted if i not in todo]
    if finished:
        print(f"cells {slurm.format_array(finished)} are done: left out")
    if not indices:
        print("nothing to submit")
        return None
    _send(r, indices, slurm.throttle_of(array) or r.site.throttle)
    return None


def resume(r: Request, dry: bool) -> None:
    """Submit what nobody has finished, works on or waits for."""
    indices = missing_cells(status(r.experiment.label, r.cells, r.experiment.run.gpus))
    if not indices:
        print("nothing to resume: every cell is done, running or waiting")
    elif dry:
        show(r, indices, r.site.throttle)
    else:
        _send(r, indices, r.site.throttle)


def _send(r: Request, indices: list[int], throttle: int) -> None:
    if slurm.has_slurm():
        job = _sbatch(r, indices, throttle)
        three = [
            f"squeue -j {job}",
            f"make status {r.spoken}",
            f"sacct -j {job} --format=JobID,State,Elapsed,MaxRSS",
        ]
    else:
        job = _start_local(r, indices)
        three = [
            f"make status {r.spoken}",
            f"make logs {r.spoken} TASK={indices[0]}",
            f"make cancel {r.spoken}",
        ]
    record = {
        "job": job,
        "array": slurm.format_array(indices),
        "label": r.experiment.label,
        "config": str(r.config),
        "overrides": list(r.overrides),
        "digest": digest_of_all(r.cells),
        "site": r.site.name,
        "time": time.time(),
    }
    write_json(run_folder(r.cells) / "submissions" / f"{job}.json", record)
    where = "Slurm job" if slurm.has_slurm() else "no Slurm here: local workers"
    print(f"{where} {job}: cells {slurm.format_array(indices)} of {r.experiment.label}")
    print("\n".join(f"next: {command}" for command in three))


def _start_local(r: Request, indices: list[int]) -> str:
    job = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    script, *arguments = _script(r)
    plan = {"command": [script, *arguments], "cells": indices, "label": r.experiment.label}
    plan |= {"gpus": r.experiment.run.gpus, "workers": r.site.throttle}
    local.start(run_folder(r.cells), job, plan, slurm.clean_environment(r.site.env))
    return job


def _sbatch(r: Request, indices: list[int], throttle: int) -> str:
    largest = slurm.max_array_size()
    if indices[-1] >= largest:
        raise UserError(
            f"cell {indices[-1]} is beyond this cluster's largest array index ({largest - 1}, MaxArraySize)"
        )
    command = sbatch_command(r, indices, throttle)
    done = subprocess.run(
        command, cwd=ROOT, env=slurm.clean_environment(r.site.env), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"sbatch refused: {said[-1]}; see `make doctor`, and DRY=1 for what was asked")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout.strip().partition(";")[0]  # "20;cluster" with -M


def show(r: Request, indices: list[int], throttle: int) -> None:
    """DRY=1: the script, the variables and flags that win over it, and the plan."""
    script = ROOT / "slurm" / f"{r.experiment.job}.sbatch"
    print(script.read_text().rstrip())
    settings = sorted(f"{k}={v}" for k, v in r.site.env.items() if k.startswith("SBATCH_"))
    print(f"\n# site {r.site.name}: " + (" ".join(settings) or "no SBATCH_* variables"))
    print(f"# would run: {shlex.join(sbatch_command(r, indices, throttle))}\n")
    plans = [p for p in plan_of(r.experiment, r.cells, r.site.cache, r.site.gpu) if p.cell.index in indices]
    print(table(plans, r.site.gpu, r.experiment.share))
    print(f"shards under {run_folder(r.cells)}")


def cancel(r: Request) -> None:
    """End every queued or running task of the experiment; finished shards stay."""
    folder = run_folder(r.cells)
    ended = []
    if slurm.has_slurm():
        queue = slurm.queue()
        mine = sorted({t.array for t in queue} & arrays_of(r.experiment.label, folder, queue))
        if mine:
            slurm.ask("scancel", *mine)
        ended += mine
    ended += local.cancel(folder)
    for beats in heartbeats(folder).values():
        if not beats[-1].get("job") and beats[-1]["host"] == HOST and is_alive(beats[-1]):
            with suppress(ProcessLookupError):
                os.kill(int(beats[-1]["pid"]), signal.SIGTERM)
                ended.append(f"pid {beats[-1]['pid']}")
    print(f"cancelled {', '.join(ended)}: finished shards are kept" if ended else "nothing is queued or running")
