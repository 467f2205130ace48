"""Submit, resume and cancel: sbatch where there is a Slurm, submitit's local executor where there is none."""

import os
import shlex
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

from lib.base.advice import advised
from lib.base.atomic import write_json
from lib.base.errors import UserError
from lib.base.process import HOST
from lib.cluster import local, slurm
from lib.cluster.arrays import Array, Parents, arrays_of, shares
from lib.cluster.lanes import Lanes, lane_named, placed, size_of
from lib.cluster.live import (
    OTHER,
    Cancelled,
    Live,
    Submission,
    asked_once,
    is_alive,
    jobs_of,
    live_tasks,
    submissions,
)
from lib.cluster.lock import submitting
from lib.cluster.plan import CellPlan, table
from lib.cluster.plan import plan as plan_of
from lib.cluster.send import (
    Request,
    by_hand,
    is_by_hand,
    longest_minutes,
    results_jobs,
    sbatch,
    sbatch_command,
    script,
    send_results,
    start_local,
    why_by_hand,
)
from lib.cluster.status import missing_cells, status
from lib.run.experiment import Needs
from lib.run.extent import Extent, extent
from lib.run.heartbeat import heartbeats
from lib.run.site import ROOT
from lib.run.task import freeze
from lib.store import Cell


def submit_chain(r: Request, array: str, dry: bool, kind: str = "") -> None:
    """Submit the cells of `array` after all that they read from, each where it is not done or under way, and last what
    shows the results, whatever became of them. `kind`: of what they read from only that kind."""
    before: frozenset[Path] = frozenset()
    read = read_by([r.cells[i] for i in chosen(r, array)[0]]) if array else None
    requests = [Request(stage.experiment, stage.config, stage.overrides, r.site) for stage in r.experiment.stages()]
    requests = [one for one in requests if kind in ("", one.experiment.kind)]
    for number, one in enumerate([*requests, r], 1):
        print(f"== stage {number} of {len(requests) + 1}: {one.experiment.label}", flush=True)
        if one is r or read is None:
            submit(one, array if one is r else "", dry, before)
        elif mine := [cell.index for cell in one.cells if cell.path in read]:
            submit(one, slurm.format_array(mine), dry, before)
        before |= {one.folder}
    print("== its results")
    running = frozenset() if dry else frozenset(task.array for task in live_tasks(r.cells).values())
    send_results(r, running | ({f"<{r.experiment.label}>"} if dry else set()), dry)


def read_by(cells: Iterable[Cell]) -> set[Path]:
    """Places of the cells that these read from, and of those that those read from."""
    parents = [parent for cell in cells for parent in cell.parents]
    return {parent.path for parent in parents} | (read_by(parents) if parents else set())


def submit(
    r: Request, array: str, dry: bool, before: frozenset[Path] = frozenset(), lanes: Lanes | None = None
) -> None:
    """Submit the cells of `array` that are neither done nor already queued. `before`: folders of what a dry run would
    have submitted. `lanes`: of a pipeline."""
    wanted, throttle = chosen(r, array)
    if dry:
        return show(r, wanted, throttle, before, lanes)
    cells = r.cells
    with submitting(r.folder) as held:
        queued = live_tasks(cells)
        finished = [i for i in wanted if extent(cells[i]).whole]
        busy = [i for i in wanted if i not in finished and cells[i].name in queued]
        if busy:
            jobs = ", ".join(sorted({queued[cells[i].name].array for i in busy}))
            print(f"cells {slurm.format_array(busy)} are already queued or running ({jobs}): left out")
        if any(queued[cells[i].name].reason == OTHER for i in busy):
            print(f"some of these were {OTHER}")
        if finished:
            print(f"cells {slurm.format_array(finished)} are done: left out")
        if not _send(r, [i for i in wanted if i not in {*busy, *finished}], throttle, queued, held, lanes):
            print("nothing to submit")
    return None


def resume(
    r: Request, array: str, dry: bool, before: frozenset[Path] | None = None, lanes: Lanes | None = None
) -> bool:
    """Submit what nobody has finished, works on or waits for; whether there was any. `before`: of a pipeline, whose
    earlier stages were resumed: what is blocked by them goes with them; and the folders that a dry run would have
    resumed."""
    wanted, throttle = chosen(r, array)
    cells = r.cells
    with nullcontext(-1) if dry else submitting(r.folder) as held:
        queue = asked_once()  # for both
        now = status(r.experiment.label, cells, ask=queue)
        blocked = {c.index for c in now.cells if c.state == "blocked" and before is not None}
        indices = sorted(i for i in {*missing_cells(now), *blocked} if i in wanted)
        for state in (c for c in now.cells if c.index in wanted and c.state in ("held", "blocked")):
            if state.index not in blocked:
                print(f"cell {state.index} ({state.name}) is {state.state}: {state.note}")
        if dry and indices:
            show(r, indices, throttle, before or frozenset(), lanes)
        elif not indices or not _send(r, indices, throttle, live_tasks(cells, queue), held, lanes):
            which = f" of {array}" if array else ""
            print(f"nothing to resume: every cell{which} is done, running, waiting or named above")
            return False
    return bool(indices)


def chosen(r: Request, array: str) -> tuple[list[int], int | None]:
    """The cells that ARRAY names, all without it, and how many tasks may run at once, where it says so."""
    count = len(r.experiment.names())
    return slurm.parse_array(array or f"0-{count - 1}", count), slurm.throttle_of(array)


def batches(
    r: Request, indices: list[int], after: Mapping[str, frozenset[str]], parents: Parents, lanes: Lanes
) -> list[Array]:
    def lane_of(cell: Cell) -> str:
        lane = lanes.get(size_of(r, cell.index))
        return lane.name if lane else ""

    plans = plan_of(r.experiment, [r.cells[i] for i in indices], r.site.cache, r.site.gpu)
    return arrays_of(r.experiment, r.site.cache, plans, after, longest_minutes(r), parents.shortened, lane_of)


def at_once(r: Request, arrays: list[Array], throttle: int | None, queued: Live, lanes: Lanes) -> list[int]:
    """Tasks of each array that may run at the same time, beside what of this experiment runs already."""
    if lanes:
        found = [(lane_named(lanes, array.lane), array) for array in arrays]
        return [lane.tasks(array) if lane else 1 for lane, array in found]
    if throttle:
        return shares([replace(array, needs=Needs(0)) for array in arrays], throttle)
    tasks = {(task.array, task.index) for task in queued.values()}
    records = {record.job: record for record in submissions(r.folder)}
    busy = 0
    for job in {array for array, _ in tasks}:
        count = sum(array == job for array, _ in tasks)
        record = records.get(job)
        busy += min(count, record.at_once) * max(record.gpus, 1) if record else count
    return shares(arrays, max(1, r.site.throttle - busy))


def _send(r: Request, indices: list[int], throttle: int | None, queued: Live, held: int, lanes: Lanes | None) -> bool:
    """False where nothing is left to submit."""
    parents, lanes = Parents(), lanes if lanes and r.experiment.on_gpu else {}
    indices, after = _waits(r, indices, parents)
    if not indices:
        return False
    if is_by_hand(r):
        print("\n".join([why_by_hand(r), *(f"next: {command}" for command in by_hand(r, indices))]))
        return True
    arrays, first = batches(r, indices, after, parents, lanes), True
    for array, tasks in zip(arrays, at_once(r, arrays, throttle, queued, lanes), strict=True):
        array, lane = placed(array, lanes)
        name = freeze(r.folder, array.cells)
        start = sbatch if slurm.has_slurm() else start_local
        job = start(r, array, tasks, name, held)
        if lane:
            lane.arrays.add(job)
        record = Submission(
            job=job,
            array=slurm.format_array(array.indices),
            tasks=name,
            config=str(r.config),
            overrides=list(r.overrides),
            at_once=tasks,
            gpus=array.needs.gpus,
            lane=array.lane,
            lane_gpus=lane.gpus if lane else 0,
            time=time.time(),
        )
        write_json(r.folder / "submissions" / f"{job}.json", {**asdict(record), "site": r.site.name})
        where = "Slurm job" if slurm.has_slurm() else "no Slurm here: local workers"
        waits = f", after {', '.join(sorted(map(str, array.after)))}" if array.after else ""
        print(f"{where} {job}: cells {_named(array)} of {r.experiment.label}{waits}")
        if first:
            print("\n".join(f"next: {command}" for command in _next(r, job, array)))
        first = False
    return True


def _named(array: Array) -> str:
    cells = slurm.format_array(one.cell.index for task in array.tasks for one in task)
    count = len(array.tasks)
    return cells if all(len(task) == 1 for task in array.tasks) else f"{cells} in {count} task{'s' * (count > 1)}"


def _next(r: Request, job: str, array: Array) -> list[str]:
    if slurm.has_slurm():
        return [f"squeue -j {job}", f"make status {r.spoken}", f"sacct -j {job} --format=JobID,State,Elapsed,MaxRSS"]
    return [f"make status {r.spoken}", f"make logs {r.spoken} TASK={array.indices[0]}", f"make cancel {r.spoken}"]


def _waits(r: Request, indices: list[int], parents: Parents) -> tuple[list[int], dict[str, frozenset[str]]]:
    """The cells that can be submitted, and what each has to wait for; the others are said."""
    after, left_out = {}, {}
    for cell in (r.cells[i] for i in indices):
        try:
            after[cell.name] = parents.waited_for(cell)
        except UserError as e:
            left_out[cell.index] = str(e)
    for index, why in left_out.items():
        print(f"cell {index} ({r.cells[index].name}) is left out: {why}")
    return [i for i in indices if i not in left_out], after


def show(
    r: Request,
    indices: list[int],
    throttle: int | None,
    before: frozenset[Path] = frozenset(),
    lanes: Lanes | None = None,
) -> None:
    """DRY=1: the script, the variables and flags that win over it, and the plan."""
    print((ROOT / "slurm" / f"{r.experiment.job}.sbatch").read_text().rstrip())
    settings = sorted(f"{k}={v}" for k, v in r.site.env.items() if k.startswith("SBATCH_"))
    print(f"\n# site {r.site.name}: " + (" ".join(settings) or "no SBATCH_* variables"))
    cells, unknown = r.cells_or_names()
    lanes = lanes if lanes and r.experiment.on_gpu else {}
    if unknown:
        gpus = r.experiment.run.gpus
        plans = [CellPlan(cells[i], Extent([], [], None, []), [], None, gpus) for i in indices]
        arrays = [Array([[one] for one in plans], Needs(gpus))]
    else:
        parents = Parents(before)
        after = _waits(r, indices, parents)[1]
        arrays = batches(r, [i for i in indices if cells[i].name in after], after, parents, lanes)
    for array, tasks in zip(arrays, at_once(r, arrays, throttle, {}, lanes), strict=True):
        array, lane = placed(array, lanes)
        if lane:
            lane.arrays.add(f"<{r.experiment.label}>")
        print(f"# would {_would(r, array, tasks)}")
    print()
    if unknown:
        print(f"rows, bytes, GPU-hours and the digests are not known yet: {advised(unknown)}")
    else:
        plans = [one for array in arrays for task in array.tasks for one in task]
        print(table(sorted(plans, key=lambda one: one.cell.index), r.site.gpu, r.experiment.share))
        if costs := r.experiment.costs(r.site.cache, r.site.gpu):
            print(costs)
    print(f"shards under {r.folder}")


def _would(r: Request, array: Array, tasks: int) -> str:
    if is_by_hand(r):
        return f"run by hand: {'; '.join(by_hand(r, array.indices))}"
    if slurm.has_slurm():
        return f"run: {shlex.join(sbatch_command(r, array, tasks, '<tasks>'))}"
    each = f", a task {array.needs.gpus} GPU" if array.needs.gpus else ""
    return f"start {tasks} workers here{each}: bash {shlex.join(script(r, '<tasks>'))}, cells {_named(array)}"


def cancel(r: Request) -> None:
    """End every queued or running task of the experiment; finished shards stay."""
    folder, ended = r.folder, []
    if folder.is_dir():  # a task that ends from here on was meant to
        write_json(folder / "cancelled.json", asdict(Cancelled(time.time())))
    if slurm.has_slurm():
        queue = slurm.queue()
        mine = sorted({t.array for t in queue} & jobs_of(folder, queue) | {*results_jobs(r, queue)})
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


def cancel_results(r: Request) -> None:
    """Of a pipeline, whose stages were cancelled."""
    if slurm.has_slurm() and (waiting := results_jobs(r, slurm.queue())):
        slurm.ask("scancel", *waiting)
        print(f"cancelled {', '.join(waiting)}: make {r.experiment.results}")
