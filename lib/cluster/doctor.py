"""Preflight: what would stop an experiment's jobs, one line a check, each that fails with the command that helps.

`make doctor CONFIG=...`; exit code 1 when a line says FAIL. Nothing here imports torch or touches a network."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lib.base.atomic import write_bytes
from lib.base.errors import UserError
from lib.cluster.gpus import gpu_lines, seen_driver, torch_cuda
from lib.cluster.local import workers_for
from lib.cluster.plan import CellPlan, plan, si
from lib.cluster.request import Env, Line, ask, slurm_lines
from lib.inputs.records import check_model, check_rows, dataset_input, local_path, model_input
from lib.inputs.samples import SamplesInput, check_samples
from lib.inputs.verified import check_bytes
from lib.run.experiment import Experiment
from lib.run.site import ROOT, Site

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def check(experiment: Experiment, site: Site, deep: bool = False) -> int:
    """`deep`: every byte of the models is read."""
    cells = plans = None
    with contextlib.suppress(UserError):  # inputs that are not fetched have their own lines
        cells = experiment.cells(site.cache, site.scratch)
        plans = plan(experiment, cells, site.cache, site.gpu)
    count = None if cells is None else len(cells)
    script = ROOT / "slurm" / f"{experiment.job}.sbatch"
    slurm = site.env.get("SUITE_SLURM") != "no"
    gpus = max((one.gpus for one in plans or []), default=experiment.run.gpus)  # of the largest task
    asked = site.env | ({"SBATCH_GPUS_PER_NODE": str(gpus)} if gpus > 1 else {})  # what submit says by a flag
    probes: list[tuple[str, Callable[[], Iterable[Line]]]] = [
        ("slurm", lambda: slurm_lines(asked, ROOT, script, count, experiment.submit)),
        ("workers", lambda: [] if slurm else worker_lines(gpus, site.throttle)),
        ("site", lambda: [site_line(site)]),
        ("scratch", lambda: [writable("scratch", site.scratch, "SUITE_SCRATCH")]),
        ("output", lambda: [writable("output", site.output, "SUITE_OUTPUT")]),
        ("space", lambda: space_lines(site, plans, lost_bytes(experiment, site.cache))),
        ("quota", lambda: quota_lines(site.env, site.scratch, plans)),
        ("python", lambda: [python_line(ROOT)]),
        ("modules", lambda: module_lines(site.env, ROOT)),
        ("torch", lambda: gpu_lines(site.env, torch_cuda(), site.gpu, slurm, seen_driver(site.env))),
        ("models", lambda: [models_line(experiment, site.cache, deep)]),
        ("datasets", lambda: [datasets_line(experiment, site.cache)]),
        ("token", lambda: [token_line(experiment, site)]),
        ("secrets", lambda: [secrets_line(site.env)]),
    ]
    levels = []
    for name, probe in probes:
        for line in _guarded(name, probe):
            levels.append(line.level)
            print(line.text, flush=True)
    print(", ".join(f"{levels.count(level)} {level}" for level in ("ok", "warn", "FAIL")))
    return int("FAIL" in levels)


def _guarded(name: str, probe: Callable[[], Iterable[Line]]) -> Iterator[Line]:
    try:
        yield from probe()
    except (UserError, OSError, ValueError) as e:
        found, _, fix = str(e).partition("; ")
        yield Line("FAIL", name, found, fix or "see the message")


def worker_lines(gpus: int, most: int) -> Iterator[Line]:
    """On a box without Slurm: whether a task could start, as a submission will ask."""
    count = workers_for(gpus, most)
    yield Line("ok", "workers", f"{count} at once" + (f", each on {gpus} GPU" if gpus else ", without a GPU"))


def site_line(site: Site) -> Line:
    """env/<site>.sh says in SUITE_SITE_NOTE what it took in place of what was expected."""
    note = site.env.get("SUITE_SITE_NOTE", "")
    return Line(
        "warn" if note else "ok",
        "site",
        site.name + (f": {note.partition('; ')[0]}" if note else ""),
        note.partition("; ")[2],
    )


def writable(name: str, folder: Path, variable: str) -> Line:
    """Make it, write, fsync, read back, delete."""
    trial = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        write_bytes(trial, secrets.token_bytes(4096))
        trial.unlink()
    except (UserError, OSError) as e:
        return Line("FAIL", name, str(e).partition("; ")[0], f"export {variable}=<a folder that can be written>")
    return Line("ok", name, f"{folder} can be written")


def space_lines(site: Site, plans: list[CellPlan] | None, lost: int) -> Iterator[Line]:
    """`lost`: bytes of recorded models that `make fetch` has to bring again."""
    need, files = _needs(plans)
    scratch, cache = (next(p for p in (root, *root.parents) if p.exists()) for root in (site.scratch, site.cache))
    if lost and scratch.stat().st_dev == cache.stat().st_dev:
        need += lost
    elif lost and lost > (free := shutil.disk_usage(cache).free):
        yield Line("FAIL", "cache", f"models take {si(lost)}, {si(free)} free in {cache}", "free some, or SUITE_CACHE=")
    free = shutil.disk_usage(scratch).free
    known = f"{si(need)} needed" if plans or lost else "what is needed is known after `make fetch`"
    level = "FAIL" if need > free else "ok"
    fix = f"free {si(need - free)}, or export SUITE_SCRATCH=<a larger place>" if need > free else ""
    yield Line(level, "space", f"{known}, {si(free)} free in {scratch}", fix)
    stat = os.statvfs(scratch)
    if not stat.f_files:
        yield Line("ok", "inodes", "this file system does not count them")
        return
    level = "FAIL" if files > stat.f_favail else "ok"
    fix = "raise run.shard_rows, delete files, or export SUITE_SCRATCH=<another place>" if level == "FAIL" else ""
    yield Line(level, "inodes", f"{files} files needed, {stat.f_favail} inodes free", fix)


def _needs(plans: list[CellPlan] | None) -> tuple[int, int]:
    """(bytes, files): shards and the merged file; a marker beside each shard, and a few files a cell."""
    return 2 * sum(p.bytes or 0 for p in plans or []), sum(2 * len(p.shards) + 4 for p in plans or [])


def quota_lines(env: Env, scratch: Path, plans: list[CellPlan] | None) -> Iterator[Line]:
    """FASRC: scratch is /n/<file system>/<lab>/..., and `quota -g <lab> /n/<file system>` tells of it."""
    parts = scratch.parts
    if env.get("SUITE_SITE") != "fasrc" or len(parts) < 4 or not shutil.which("quota", path=env.get("PATH")):
        return
    command = ["quota", "-g", parts[3], str(Path(*parts[:3]))]
    good, out = ask(env, *command)
    found = parse_quota(out) if good else None
    if found is None:
        yield Line("warn", "quota", f"`{' '.join(command)}` was not understood", "run it and read it yourself")
        return
    (need, files), (used, limit, used_files, limit_files) = _needs(plans), found
    what = f"{si(used)} of {si(limit) if limit else 'unlimited'}"
    what += f", {used_files:.0f} of {limit_files:.0f} files" if limit_files else ""
    if (limit and used + need > limit) or (limit_files and used_files + files > limit_files):
        yield Line(
            "FAIL", "quota", f"{parts[3]} uses {what}; {si(need)}, {files} files needed", "free some of the lab's"
        )
    else:
        yield Line("ok", "quota", f"{parts[3]} uses {what}")


def parse_quota(text: str) -> tuple[float, float, float, float] | None:
    """(bytes, limit, files, limit) of quota's and lfs quota's table: used, soft, hard [grace] twice; kB without a unit,
    0 = no limit."""
    number = re.compile(r"(\d+(?:\.\d+)?)([kKMGTP]?)\*?")
    for line in text.splitlines():
        found = [m for m in map(number.fullmatch, line.split()) if m]
        if len(found) >= 3:
            used, soft, hard = (float(m[1]) * 1024 ** " KMGTP".index(m[2].upper() or "K") for m in found[:3])
            files = [float(m[1]) * 1000 ** " KMGTP".index(m[2].upper() or " ") for m in found[3:6]]
            counted, most = (files[0], files[2] or files[1]) if len(files) == 3 else (0.0, 0.0)
            return used, hard or soft, counted, most
    return None


def python_line(root: Path, version: tuple[int, ...] = sys.version_info[:2]) -> Line:
    name = ".".join(map(str, version))
    if version not in ((3, 11), (3, 12)):
        return Line("FAIL", "python", f"{name} is neither 3.11 nor 3.12", "PYTHON=python3.12 make setup")
    with contextlib.suppress(OSError, ValueError):
        build, digest = (root / ".venv" / "suite-stamp").read_text().split()
        if hashlib.sha256((root / "env" / f"lock-{build}.txt").read_bytes()).hexdigest() == digest:
            return Line("ok", "python", f"{name}, .venv as env/lock-{build}.txt says")
    return Line("FAIL", "python", f"{name}, but .venv is not what env/lock-*.txt says", "make setup")


def module_lines(env: Env, root: Path) -> Iterator[Line]:
    """Each of SUITE_MODULES is loaded as a job loads it."""
    wanted = env.get("SUITE_MODULES", "").split()
    if not wanted:
        return
    command = ["bash", "-c", ". env/modules.sh"]
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        yield Line("warn", "modules", f"{' '.join(wanted)}: no answer in 120 s", "export SUITE_MODULES=")
        return
    missing = [line.removeprefix("warning: ") for line in done.stderr.splitlines() if line.startswith("warning: ")]
    for line in missing:
        found, _, fix = line.partition("; ")
        yield Line("warn", "modules", f"{found}; jobs go on without it", fix or "export SUITE_MODULES=")
    if not missing:
        yield Line("ok", "modules", " ".join(wanted))


def models_line(experiment: Experiment, cache: Path, deep: bool = False) -> Line:
    words = []
    for spec in experiment.models():
        found = model_input(cache, spec.id, spec.revision)
        check_model(found)
        words.append(f"{found.id} {found.commit[:12]} {si(found.bytes)}" + (f", {check_bytes(found)}" if deep else ""))
    return Line("ok", "models", ", ".join(words))


def lost_bytes(experiment: Experiment, cache: Path) -> int:
    lost = 0
    for spec in experiment.models():
        with contextlib.suppress(UserError):
            model = model_input(cache, spec.id, spec.revision)
            try:
                check_model(model)
            except UserError:
                lost += model.bytes
    return lost


def datasets_line(experiment: Experiment, cache: Path) -> Line:
    """Datasets, or the sets of samples that were made from them."""
    rows = [dataset_input(cache, spec.id, spec.revision, spec.split) for spec in experiment.datasets()]
    for data in rows:
        check_rows(cache, data)
    sets = _sets(experiment, cache)
    for found in sets:
        check_samples(cache, found)
    count = sum(found.rows for found in [*rows, *sets])
    kind = f"{len(sets)} sets of samples" if sets else str(len(rows))
    return Line("ok", "datasets", f"{kind}, {count} rows, each with its sha256")


def _sets(experiment: Experiment, cache: Path) -> list[SamplesInput]:
    data = experiment.token_sets()
    return [data.prepared(cache, experiment.models()[0], name) for name in data.sets()] if data else []


def token_line(experiment: Experiment, site: Site) -> Line:
    """Only the files' modes are looked at: their text stays where it is."""
    path = Path(site.env["HF_TOKEN_PATH"])
    loose = [p for p in (path, path.with_name("stored_tokens")) if p.exists() and p.stat().st_mode & 0o077]
    if loose:
        names = " ".join(map(str, loose))
        return Line("FAIL", "token", f"others can read {names}", f"chmod 600 {names}")
    if path.exists():
        return Line("ok", "token", f"{path}, mode 600")
    data = experiment.token_sets()
    sources = [*data.scorers(), *(spec for spec, _ in data.sets().values())] if data else []
    ids = [spec.id for spec in [*experiment.models(), *experiment.datasets(), *sources]]
    if all(local_path(site.cache, id) for id in ids):
        return Line("ok", "token", "none, and every input is local")
    return Line("warn", "token", f"none in {path}: gated and private repositories need it", ".venv/bin/hf auth login")


def secrets_line(env: Env) -> Line:
    here = [name for name in SECRETS if env.get(name) or os.environ.get(name)]
    if here:
        found = f"{', '.join(here)} would travel with every job (sbatch --export=ALL)"
        return Line("warn", "secrets", found, f"unset {' '.join(here)}, and keep the token in its file: hf auth login")
    return Line("ok", "secrets", "no token among the variables that jobs inherit")
