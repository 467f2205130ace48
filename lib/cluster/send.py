"""Sending an array off: to sbatch where there is a Slurm, to workers of this box where there is none, or, where a stage
needs no GPU and nothing is for that, as commands to a person."""

import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lib.base.advice import spoken
from lib.base.errors import UserError
from lib.cluster import local, slurm
from lib.cluster.arrays import Array
from lib.cluster.request import minutes, requested
from lib.run.experiment import Experiment
from lib.run.heartbeat import heartbeats
from lib.run.site import ROOT, Site
from lib.store import Cell

# Of a site whose jobs run on GPUs: not for a stage that needs none.
GPU_OPTIONS = (
    *("SBATCH_CONSTRAINT", "SBATCH_GPU", "SBATCH_GRES", "SBATCH_CPUS_PER_GPU", "SBATCH_MEM_PER_GPU"),
    "SBATCH_PARTITION",
)


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
                found.append(Cell(index, name, None, digest, self.folder / "cells" / f"{name}-{digest[:8]}"))
            return found, str(e)

    @property
    def folder(self) -> Path:
        return self.site.scratch / self.experiment.label

    @property
    def spoken(self) -> str:
        """How this experiment is named to make."""
        return spoken(self.config, self.overrides)


def is_by_hand(r: Request) -> bool:
    """Whether a stage that needs a network, or no GPU, has no partition that is for that."""
    return not r.experiment.on_gpu and slurm.has_slurm() and not r.site.env.get("SUITE_CPU_PARTITION")


def by_hand(r: Request, indices: Sequence[int]) -> list[str]:
    """What to type on a login node instead."""
    words = shlex.join(["--config", str(r.config), *r.overrides])
    return [f".venv/bin/python -m jobs.{r.experiment.job} {words} --index {i}" for i in indices]


def why_by_hand(r: Request) -> str:
    return f"{r.experiment.label} needs no GPU, and this site names no CPU partition (SUITE_CPU_PARTITION): run it here"


def start_local(r: Request, array: Array, tasks: int, name: str, held: int) -> str:
    job = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{array.indices[0]}"
    workers = local.workers_for(array.needs.gpus, tasks * max(array.needs.gpus, 1))
    after = [str(queue) for queue in sorted(r.site.scratch.glob("*/queue/local-*")) if queue.name in array.after]
    plan = local.Plan(script(r, name), name, r.experiment.label, array.needs.gpus, workers, after)
    local.start(r.folder, job, plan, slurm.clean_environment(r.site.env), held)
    return job


def script(r: Request, name: str) -> list[str]:
    """The batch script and what it is called with; --tasks stops a task whose configuration or inputs were edited."""
    if r.config.suffix != ".yaml":
        raise UserError(f"{r.config}: the batch script knows a configuration by its name's end; call it *.yaml")
    return [f"slurm/{r.experiment.job}.sbatch", str(r.config), f"--tasks={name}", *r.overrides]


def sbatch_command(r: Request, array: Array, tasks: int, name: str) -> list[str]:
    """Flags win over SBATCH_* variables, which win over the script's #SBATCH lines."""
    flags = [f"--array={slurm.format_array(array.indices)}%{tasks}", f"--job-name={r.experiment.label}"]
    flags.append(f"--comment={slurm.TASKS}{name}")
    if array.needs.gpus > 1:  # the batch file asks for one
        flags.append(f"--gpus-per-node={array.needs.gpus}")
    if array.needs.memory_gib:
        each = -(-array.needs.memory_gib // max(array.needs.gpus, 1))
        flags.append(f"--mem{'-per-gpu' if array.needs.gpus else ''}={each}G")
    if array.minutes and "SBATCH_TIMELIMIT" not in r.site.env:
        flags.append(f"--time={array.minutes}")
    if not r.experiment.on_gpu:
        flags.append(f"--partition={r.site.env['SUITE_CPU_PARTITION']}")
    if array.after:
        flags.append(f"--dependency=afterany:{':'.join(sorted(array.after))}")
    return ["sbatch", "--parsable", *flags, *script(r, name)]


def send_results(r: Request, after: frozenset[str], dry: bool) -> None:
    """A job without a GPU that shows an experiment's results once these arrays have ended, however they did; where no
    Slurm runs, or nothing is for such jobs, the command for it."""
    target = r.experiment.results
    partition, file = r.site.env.get("SUITE_CPU_PARTITION"), f"slurm/{target.replace('-', '_')}.sbatch"
    if not slurm.has_slurm() or not partition or not (ROOT / file).exists():
        print(f"next: make {target} {r.spoken}" + (", when they have ended" if after else ""))
        return
    flags = ["--parsable", f"--partition={partition}", f"--job-name={results_name(r)}"]
    if after:
        flags.append(f"--dependency=afterany:{':'.join(sorted(after))}")
    if mail := r.site.env.get("SUITE_MAIL"):  # one, when everything has ended
        flags += [f"--mail-user={mail}", "--mail-type=END,FAIL"]
    command = ["sbatch", *flags, file, str(r.config), *r.overrides]
    if dry:
        print(f"# would run: {shlex.join(command)}")
        return
    earlier = results_jobs(r, slurm.queue())
    job = _sbatch(r, command, without_gpu(r.site.env))
    if earlier:
        slurm.ask("scancel", *earlier)
    print(f"Slurm job {job}: make {target}" + (f", in place of {', '.join(earlier)}" if earlier else ""))


def results_name(r: Request) -> str:
    return f"{r.experiment.results}-{r.experiment.label}"


def results_jobs(r: Request, queue: Sequence[slurm.Queued]) -> list[str]:
    """Those that wait to show an experiment's results: one is enough."""
    return sorted({task.array for task in queue if task.name == results_name(r) and task.state == "PENDING"})


def without_gpu(env: dict[str, str]) -> dict[str, str]:
    """A stage without a GPU must not be asked of the GPU site's nodes: its SBATCH_* would win over the file."""
    return {k: v for k, v in slurm.clean_environment(env).items() if not k.startswith(GPU_OPTIONS)}


def sbatch_environment(r: Request) -> dict[str, str]:
    return slurm.clean_environment(r.site.env) if r.experiment.on_gpu else without_gpu(r.site.env)


def longest_minutes(r: Request) -> float:
    """What the partition allows; no limit where Slurm does not say."""
    text = (ROOT / "slurm" / f"{r.experiment.job}.sbatch").read_text()
    partition = requested(text, r.site.env).get("partition", "") if slurm.has_slurm() else ""
    found = [math.inf]
    for name in filter(None, partition.split(",")):
        with suppress(UserError):
            said = re.search(r"\bMaxTime=(\S+)", slurm.ask("scontrol", "-o", "show", "partition", name))
            found += [minutes(said[1])] if said else []
    return min(found)


def sbatch(r: Request, array: Array, tasks: int, name: str, held: int) -> str:
    largest = slurm.max_array_size()
    if array.indices[-1] >= largest:
        raise UserError(
            f"cell {array.indices[-1]} is beyond this cluster's largest array index ({largest - 1}, MaxArraySize)"
        )
    return _sbatch(r, sbatch_command(r, array, tasks, name), sbatch_environment(r), held)


def _sbatch(r: Request, command: list[str], env: dict[str, str], *held: int) -> str:
    """`held`: it holds the lock too: were we killed now, it would still submit."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False, pass_fds=held)
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
