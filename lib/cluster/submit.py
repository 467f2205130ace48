"""Submit, resume and cancel: sbatch where there is a Slurm, submitit's local executor where there is none."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lib.base.advice import advised, spoken
from lib.base.atomic import write_json
from lib.base.errors import UserError
from lib.base.process import HOST
from lib.cluster import local, slurm
from lib.cluster.lock import submitting
from lib.cluster.plan import plan as plan_of
from lib.cluster.plan import table
from lib.cluster.status import arrays_of, heartbeats, is_alive, live_tasks, missing_cells, status
from lib.run.command import digest_of_all
from lib.run.experiment import Experiment
from lib.run.site import ROOT, Site
from lib.store import Cell


@dataclass(frozen=True)
class Request:
    experiment: Experiment
    config: Path
    overrides: Sequence[str]
    site: Site

    @cached_property
    def cells(self) -> list[Cell]:
        """A UserError names an input that is not fetched."""
        return self.experiment.cells(self.site.cache, self.site.scratch)

    def cells_or_names(self) -> tuple[list[Cell], str]:
        """The cells; where inputs are not fetched, what is known of them without, and what is missing."""
        try:
            return self.cells, ""
        except UserError as e:
            last = {name: beats[-1].digest for name, beats in heartbeats(self.folder).items()}
            found = []
            for index, name in enumerate(self.experiment.names()):
                digest = last.get(name, "")
                found.append(Cell(index, name, 0, digest, self.folder / "cells" / f"{name}-{digest[:8]}"))
            return found, str(e)

    @property
    def folder(self) -> Path:
        return self.site.scratch / self.experiment.label

    @property
    def spoken(self) -> str:
        """How this experiment is named to make."""
        return spoken(self.config, self.overrides)


def sbatch_command(r: Request, indices: list[int], throttle: int, digest: str) -> list[str]:
    """Flags win over SBATCH_* variables, which win over the script's #SBATCH lines."""
    array = f"{slurm.format_array(indices)}%{throttle}"
    flags = [f"--array={array}", f"--job-name={r.experiment.label}"]
    if r.experiment.run.gpus > 1:  # the batch file asks for one
        flags.append(f"--gpus-per-node={r.experiment.run.gpus}")
    return ["sbatch", "--parsable", *flags, *_script(r, digest)]


def _script(r: Request, digest: str) -> list[str]:
    """The batch script and what it is called with; --expect stops a task whose configuration or inputs were edited."""
    script = f"slurm/{r.experiment.job}.sbatch"
    if r.config.suffix != ".yaml":
        raise UserError(f"{r.config}: the batch script knows a configuration by its name's end; call it *.yaml")
    return [script, str(r.config), f"--expect={digest[:16]}", *r.overrides]


def submit(r: Request, array: str, dry: bool) -> None:
    """Submit the cells of `array` that are neither done nor already queued."""
    wanted, throttle = chosen(r, array)
    if dry:
        return show(r, wanted, throttle)
    cells = r.cells
    with submitting(r.folder) as held:
        queued = live_tasks(r.experiment.label, cells)
        busy = sorted(set(queued) & set(wanted))
        if busy:
            jobs = ", ".join(sorted({queued[i].array for i in busy}))
            print(f"cells {slurm.format_array(busy)} are already queued or running ({jobs}): left out")
        todo = {p.cell.index for p in plan_of(r.experiment, cells, r.site.cache, r.site.gpu) if p.rows}
        indices = [i for i in wanted if i in todo and i not in busy]
        finished = [i for i in wanted if i not in todo]
        if finished:
            print(f"cells {slurm.format_array(finished)} are done: left out")
        if indices:
            return _send(r, indices, throttle, held)
    print("nothing to submit")
    return None


def resume(r: Request, array: str, dry: bool) -> None:
    """Submit what nobody has finished, works on or waits for."""
    wanted, throttle = chosen(r, array)
    cells = r.cells
    with nullcontext(-1) if dry else submitting(r.folder) as held:
        missing = missing_cells(status(r.experiment.label, cells, r.experiment.run.gpus))
        indices = [i for i in missing if i in wanted]
        if not indices:
            which = f" of {array}" if array else ""
            print(f"nothing to resume: every cell{which} is done, running or waiting")
        elif dry:
            show(r, indices, throttle)
        else:
            _send(r, indices, throttle, held)


def chosen(r: Request, array: str) -> tuple[list[int], int]:
    """The cells that ARRAY names, all without it, and how many of them may run at once."""
    count = len(r.experiment.names())
    return slurm.parse_array(array or f"0-{count - 1}", count), slurm.throttle_of(array) or r.site.throttle


def _send(r: Request, indices: list[int], throttle: int, held: int) -> None:
    if slurm.has_slurm():
        job = _sbatch(r, indices, throttle, held)
        three = [
            f"squeue -j {job}",
            f"make status {r.spoken}",
            f"sacct -j {job} --format=JobID,State,Elapsed,MaxRSS",
        ]
    else:
        job = _start_local(r, indices, held)
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
    write_json(r.folder / "submissions" / f"{job}.json", record)
    where = "Slurm job" if slurm.has_slurm() else "no Slurm here: local workers"
    print(f"{where} {job}: cells {slurm.format_array(indices)} of {r.experiment.label}")
    print("\n".join(f"next: {command}" for command in three))


def _start_local(r: Request, indices: list[int], held: int) -> str:
    job = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    script, *arguments = _script(r, digest_of_all(r.cells))
    label, gpus = r.experiment.label, r.experiment.run.gpus
    plan = local.Plan([script, *arguments], indices, label, gpus, workers=r.site.throttle)
    local.start(r.folder, job, plan, slurm.clean_environment(r.site.env), held)
    return job


def _sbatch(r: Request, indices: list[int], throttle: int, held: int) -> str:
    largest = slurm.max_array_size()
    if indices[-1] >= largest:
        raise UserError(
            f"cell {indices[-1]} is beyond this cluster's largest array index ({largest - 1}, MaxArraySize)"
        )
    command = sbatch_command(r, indices, throttle, digest_of_all(r.cells))
    try:  # it holds the lock too: were we killed now, it would still submit
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=slurm.clean_environment(r.site.env),
            capture_output=True,
            check=False,
            pass_fds=(held,),
        )
    except OSError as e:
        raise UserError(f"sbatch does not run here ({e.strerror}); see `make doctor`") from None
    said, warned = (text.decode(errors="replace").strip() for text in (done.stdout, done.stderr))
    if done.returncode:
        why = ((warned or said).splitlines() or ["no message"])[-1]
        raise UserError(
            f"sbatch refused: {why}; see `make doctor`, and `make {r.experiment.submit} DRY=1` for what was asked"
        )
    if warned:
        print(warned, file=sys.stderr)
    job = said.partition(";")[0]  # "20;cluster" with -M
    if not job.isdecimal():
        raise UserError(f"sbatch said '{said[:80]}', which names no job; see squeue for what it has submitted")
    return job


def show(r: Request, indices: list[int], throttle: int) -> None:
    """DRY=1: the script, the variables and flags that win over it, and the plan."""
    script = ROOT / "slurm" / f"{r.experiment.job}.sbatch"
    print(script.read_text().rstrip())
    settings = sorted(f"{k}={v}" for k, v in r.site.env.items() if k.startswith("SBATCH_"))
    print(f"\n# site {r.site.name}: " + (" ".join(settings) or "no SBATCH_* variables"))
    cells, unknown = r.cells_or_names()
    command = sbatch_command(r, indices, throttle, "<digest>" if unknown else digest_of_all(cells))
    print(f"# would run: {shlex.join(command)}\n")
    if unknown:
        print(f"rows, bytes, GPU-hours and the digest are not known yet: {advised(unknown)}")
    else:
        plans = [p for p in plan_of(r.experiment, cells, r.site.cache, r.site.gpu) if p.cell.index in indices]
        print(table(plans, r.site.gpu, r.experiment.share))
    print(f"shards under {r.folder}")


def cancel(r: Request) -> None:
    """End every queued or running task of the experiment; finished shards stay."""
    folder, ended = r.folder, []
    if slurm.has_slurm():
        queue = slurm.queue()
        mine = sorted({t.array for t in queue} & arrays_of(r.experiment.label, folder, queue))
        if mine:
            slurm.ask("scancel", *mine)
        ended += mine
    ended += local.cancel(folder)
    for beats in heartbeats(folder).values():
        last = beats[-1]
        if not last.job and last.host == HOST and is_alive(last):
            with suppress(ProcessLookupError):
                os.kill(last.pid, signal.SIGTERM)
                ended.append(f"pid {last.pid}")
    print(f"cancelled {', '.join(ended)}: finished shards are kept" if ended else "nothing is queued or running")
