"""The commands for a pipeline: what they do for one experiment, for all its stages in their order."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from lib.base.errors import UserError
from lib.cluster import grid, logs, slurm, submit
from lib.cluster.lanes import Lanes, lanes_of
from lib.cluster.live import Ask, asked_once, live_tasks
from lib.cluster.lock import submitting
from lib.cluster.pick import must_be_known, words_of
from lib.cluster.plan import estimates
from lib.cluster.send import Request, send_results
from lib.cluster.show import WATCH_SECONDS
from lib.cluster.status import status
from lib.run.extent import looked_at_once
from lib.run.pipeline import Pipeline
from lib.run.site import Site
from lib.store import Cell

Meant = tuple[Request, str | None]  # a stage, and its cells as ARRAY says them; None: none of them


def requests_of(pipeline: Pipeline, site: Site) -> list[Request]:
    return [Request(stage.experiment, stage.config, stage.overrides, site) for stage in pipeline.stages()]


def run(
    r: Request, pipeline: Pipeline, command: str, places: Mapping[str, str], dry: bool, as_json: bool, watch: bool
) -> int:
    requests = requests_of(pipeline, r.site)
    if command in ("submit", "resume"):
        meant = chosen(requests, places)
        with nullcontext() if dry else submitting(r.folder):  # two at once would part the same GPUs
            (send if command == "submit" else resume)(r, meant, dry)
    elif command == "cancel":
        for one in reversed(requests):  # children first: the end of a parent would start them
            print(f"== {one.experiment.label}")
            submit.cancel(one)
        submit.cancel_results(r)
    elif command == "verify":
        return max(logs.verify(one.cells, one.experiment.schema(r.site.cache)) for one in requests)
    elif command == "logs":
        show_logs(requests)
    else:
        return show_status(r, pipeline, as_json, watch)
    return 0


def send(r: Request, meant: Sequence[Meant], dry: bool) -> None:
    before: frozenset[Path] = frozenset()
    lanes = _lanes(meant)
    for number, (one, array) in enumerate(meant, 1):
        print(f"== stage {number} of {len(meant)}: {one.experiment.label}", flush=True)
        if array is None:
            print("none of its cells is meant")
            continue
        submit.submit(one, array, dry, before, lanes)
        before |= {one.folder}
    _results(r, [one for one, _ in meant], dry)


def resume(r: Request, meant: Sequence[Meant], dry: bool) -> None:
    """What nobody has finished, works on or waits for, with all that reads from it."""
    before: frozenset[Path] = frozenset()
    lanes = _lanes(meant)
    for one, array in meant:
        if array is not None:
            print(f"== {one.experiment.label}", flush=True)
            before |= {one.folder} if submit.resume(one, array, dry, before, lanes) and dry else set()
    _results(r, [one for one, _ in meant], dry)


def _lanes(meant: Sequence[Meant]) -> Lanes:
    """On a box without Slurm its workers share slots instead; and what is not fetched can be shown, not sent."""
    if not slurm.has_slurm() or any(one.cells_or_names()[1] for one, _ in meant):
        return {}
    wanted = {one.experiment.label: submit.chosen(one, array)[0] for one, array in meant if array is not None}
    return lanes_of([one for one, _ in meant], wanted)


def _results(r: Request, requests: Sequence[Request], dry: bool) -> None:
    print("== its results")
    running = frozenset(task.array for one in requests for task in live_tasks(one.cells).values() if not dry)
    send_results(r, running | ({f"<{one.experiment.label}>" for one in requests} if dry else set()), dry)


def chosen(requests: Sequence[Request], places: Mapping[str, str]) -> list[Meant]:
    """Each stage's cells that are meant, all without SIZES and TRAITS, and what they read from. None: none of its."""
    asked = words_of(places)
    for axis, words in asked.items():
        known = list(dict.fromkeys(value for one in requests for value in one.experiment.places().get(axis, [])))
        must_be_known(axis, words, known)
    if not asked:
        return [(one, "") for one in requests]
    meant = {one.experiment.label: _meant(one, asked) for one in requests}
    if not any(meant.values()):
        said = " and ".join(f"{axis}={' '.join(words)}" for axis, words in asked.items())
        raise UserError(f"no cell of any stage is of {said}; `make status` shows what there is")
    read = submit.read_by(one.cells[i] for one in requests for i in meant[one.experiment.label])
    found: list[Meant] = []
    for one in requests:
        indices = meant[one.experiment.label] | {cell.index for cell in one.cells if cell.path in read}
        found.append((one, slurm.format_array(sorted(indices)) if indices else None))
    return found


def _meant(r: Request, asked: Mapping[str, Sequence[str]]) -> set[int]:
    own = r.experiment.places()
    every = range(len(r.experiment.names()))
    return {i for i in every if all(own[axis][i] in words for axis, words in asked.items() if axis in own)}


def statuses(requests: Sequence[Request], ask: Ask | None = None) -> list[grid.Row]:
    """The queue is asked once for all stages; a word that it could not be is each stage's."""
    ask = ask or asked_once()
    with looked_at_once():
        return [_row(one, ask) for one in requests]


def _row(r: Request, ask: Ask) -> grid.Row:
    cells, unknown = r.cells_or_names()
    seconds = estimates(r.experiment, [] if unknown else cells, r.site.cache, r.site.gpu)
    now = status(r.experiment.label, cells, unknown, ask, seconds)
    needs = {} if unknown else {cell.name: _gpus(r, cell) for cell in cells}
    return grid.Row(r, now, r.experiment.places(), seconds, needs)


def _gpus(r: Request, cell: Cell) -> int:
    """Of a task; as configured where the cell's model is not fetched."""
    with suppress(UserError):
        return r.experiment.needs(r.site.cache, cell).gpus
    return r.experiment.run.gpus


def show_status(r: Request, pipeline: Pipeline, as_json: bool, watch: bool) -> int:
    """As for one experiment: watching ends with 1 where something needs a look, and not while the queue cannot be
    asked."""
    while True:
        rows = statuses(requests_of(pipeline, r.site))  # anew: how many rows there are may be known by now
        waits = any(row.now.queue_note and row.now.counts["done"] < len(row.now.cells) for row in rows)
        active = watch and (waits or any(row.now.counts["running"] + row.now.counts["pending"] for row in rows))
        if as_json:
            print(json.dumps([row.now.json() for row in rows], indent=1), flush=True)
        else:
            clear = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() else ""
            print(clear + grid.table(r.spoken, rows, shutil.get_terminal_size((160, 50)).columns), flush=True)
        if not active:
            bad = ("failed", "stale", "held", "blocked")
            return int(watch and any(row.now.counts[state] for row in rows for state in bad))
        time.sleep(WATCH_SECONDS)


def show_logs(requests: Sequence[Request]) -> None:
    shown = False
    for row in statuses(requests):
        if row.now.counts["failed"] + row.now.counts["stale"]:
            print(f"== {row.request.experiment.label}", flush=True)
            logs.show(row.request, "")
            shown = True
    if not shown:
        print("no cell of any stage has failed; a single one's: make logs CONFIG=... TASK=...")
