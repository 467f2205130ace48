"""python -m jobs.cluster submit|resume|status|logs|cancel|verify|doctor: what `make` calls."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lib.base.advice import about, advised
from lib.base.errors import UserError
from lib.cluster import logs, overview, pipeline, show, submit
from lib.cluster.pick import picked
from lib.cluster.plan import estimates
from lib.cluster.send import Request
from lib.cluster.status import status
from lib.config.loading import overrides_of
from lib.run.command import Load
from lib.run.experiment import Experiment
from lib.run.pipeline import Pipeline
from lib.run.site import Site, site

AXES = ("SIZES", "TRAITS", "PARTS")


def main(load: Load) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.cluster", description=__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=["submit", "resume", "status", "logs", "cancel", "verify", "doctor"])
    parser.add_argument("--config", default="", help="configs/*.yaml; without it, status shows every experiment")
    parser.add_argument("--set", default="", help="overrides in one text, parted and quoted as in a shell")
    parser.add_argument("--array", default="", help="cells, e.g. 0-14, 3,7-9 or 0-14%%4; default all")
    for axis in AXES:
        parser.add_argument(f"--{axis.lower()}", default="", help="cells by what they are of, beside --array")
    parser.add_argument("--task", default="", help="cell whose log is shown")
    parser.add_argument("--dry", action="store_true", help="show the script and the plan, submit nothing")
    parser.add_argument("--chain", nargs="?", const="all", help="submit also what it reads from, all or of one kind")
    parser.add_argument("--deep", action="store_true", help="doctor reads every byte of the models")
    parser.add_argument("--json", action="store_true", help="status for programs")
    parser.add_argument("--watch", action="store_true", help="status again every 10 s until all is done")
    parser.add_argument("--brief", action="store_true", help="while watching, one line each time; the table at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    here, overrides = site(), [*overrides_of(args.set), *args.overrides]
    if not args.config:
        return _without_config(args.command, overrides, here, load, args.json, args.watch)
    about(args.config, overrides)
    experiment = load(args.config, overrides)
    if args.command == "doctor":
        from lib.cluster.doctor import check

        first = experiment.stages()[0].experiment if isinstance(experiment, Pipeline) else experiment
        return check(first, here, args.deep)
    overrides += pinned(experiment, overrides)
    request = Request(experiment, Path(args.config), overrides, here)
    places = {axis: getattr(args, axis.lower()) for axis in AXES}
    if isinstance(experiment, Pipeline):
        if args.array or args.task:
            raise UserError(f"{args.config} is a pipeline: ARRAY and TASK name cells of one experiment; say its CONFIG")
        return pipeline.run(request, experiment, args.command, places, args.dry, args.json, args.watch)
    array = which(experiment, args.array, places)
    if args.command == "submit" and args.chain:
        submit.submit_chain(request, array, args.dry, "" if args.chain == "all" else args.chain)
    elif args.command == "submit":
        submit.submit(request, array, args.dry)
    elif args.command == "resume":
        submit.resume(request, array, args.dry)
    elif args.command == "cancel":
        submit.cancel(request)
    elif args.command == "logs":
        logs.show(request, args.task)
    elif args.command == "verify":
        return logs.verify(request.cells, experiment.schema(here.cache))
    else:
        return _status(request, args.json, args.watch, args.brief)
    return 0


def pinned(experiment: Experiment, overrides: Sequence[str]) -> list[str]:
    """Overrides for what the checkout says now, so that a job which starts later reads the same."""
    said = {text.partition("=")[0] for text in overrides}
    return [f"{key}={value}" for key, value in experiment.pinned().items() if key not in said]


def which(experiment: Experiment, array: str, axes: Mapping[str, str]) -> str:
    """The cells that are meant, as ARRAY says them."""
    found = picked(experiment, axes)
    if array and found:
        raise UserError(f"ARRAY={array} and {' or '.join(AXES)} both name cells; say one of them")
    return array or found


def _without_config(command: str, overrides: list[str], here: Site, load: Load, as_json: bool, watch: bool) -> int:
    if command != "status" or overrides or watch:
        raise overview.which(command, here, load)
    print(json.dumps(overview.as_json(here, load), indent=1) if as_json else overview.table(here, load), flush=True)
    return 0


def _status(r: Request, as_json: bool, watch: bool, brief: bool) -> int:
    """Watching ends with 1 when a cell failed, went stale, is held or blocked, and not while the queue cannot be
    asked; a look is 0."""
    while True:
        r = replace(r)  # anew: how many rows there are may be known by now
        cells, unknown = r.cells_or_names()
        seconds = estimates(r.experiment, [] if unknown else cells, r.site.cache, r.site.gpu)
        now = status(r.experiment.label, cells, advised(unknown), seconds=seconds)
        waits = now.queue_note and now.counts["done"] < len(cells)  # nobody knows what runs: ask again
        active = watch and (waits or now.counts["running"] + now.counts["pending"])
        if as_json:
            print(json.dumps(now.json(), indent=1), flush=True)
        elif active and brief:
            print(show.totals(now)[0], flush=True)
        else:
            clear = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() else ""
            width, targets = shutil.get_terminal_size((160, 50)).columns, (r.experiment.submit, r.experiment.results)
            print(clear + show.table(now, r.spoken, targets, width), flush=True)
        if not active:
            return int(watch and any(now.counts[state] for state in ("failed", "stale", "held", "blocked")))
        time.sleep(show.WATCH_SECONDS)
