"""Every experiment on this scratch in a line: what there is to look at when no CONFIG is said."""

from dataclasses import dataclass
from pathlib import Path

from lib.base.advice import spoken
from lib.base.errors import UserError, one_line
from lib.cluster.live import Submission, asked_once, submissions
from lib.cluster.send import Request
from lib.cluster.status import Status, status
from lib.run.command import Load
from lib.run.site import ROOT, Site

LINE = "{:<28} {:>9} {:>8} {:>8}  {:<18} {}"


@dataclass(frozen=True)
class Found:
    """A folder of scratch that holds an experiment."""

    label: str
    request: Request | None  # None: what it was made from is not known
    why: str = ""

    @property
    def look(self) -> str:
        return f"make status {self.request.spoken}" if self.request else self.why


def experiments(site: Site, load: Load) -> list[Found]:
    """The latest submitted first. What sbatch submitted by itself left no record: its configuration is looked for."""
    try:
        folders = [
            p for p in site.scratch.iterdir() if any((p / n).is_dir() for n in ("submissions", "tasks", "cells"))
        ]
    except OSError:
        return []
    records = {folder: (submissions(folder) or [None])[-1] for folder in folders}
    folders.sort(key=lambda folder: (-(r.time if (r := records[folder]) else 0), folder.name))
    plain = _configs(load)
    return [_found(folder.name, records[folder], plain, site, load) for folder in folders]


def _found(label: str, record: Submission | None, plain: dict[str, Path], site: Site, load: Load) -> Found:
    config = (record.config if record else "") or plain.get(label)
    if not config:
        return Found(label, None, "which CONFIG and SET it was made from is not known: no record of a submission")
    overrides = record.overrides if record else []
    try:
        request = Request(load(Path(config), overrides), Path(config), overrides, site)
        now = request.experiment.label
    except UserError as e:
        return Found(label, None, one_line(e))
    if now != label:
        return Found(label, None, f"{spoken(config, overrides)} has become another experiment")
    return Found(label, request)


def _configs(load: Load) -> dict[str, Path]:
    """The repository's configurations by the name of what they make."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        try:
            found[load(path, []).label] = path.relative_to(ROOT)
        except UserError:
            continue
    return found


def table(site: Site, load: Load) -> str:
    found = experiments(site, load)
    if not found:
        return f"nothing was submitted on {site.scratch} yet; `make submit-lls` and `make submit-attributions` do"
    pairs = _statuses(found)
    lines = [LINE.format("experiment", "done", "running", "pending", "jobs", "to look closer")]
    lines += [_line(one, now) for one, now in pairs]
    notes = {now.queue_note for _, now in pairs if now and now.queue_note}
    return "\n".join([str(site.scratch), *lines, *(f"the queue could not be asked: {note}" for note in notes)])


def _line(one: Found, now: Status | None) -> str:
    if now is None:
        return LINE.format(one.label, "?", "?", "?", "-", one.look)
    jobs = {c.job.partition("_")[0] for c in now.cells if c.state in ("running", "pending")}
    live = ["?" if now.queue_note else now.counts[state] for state in ("running", "pending")]
    done = f"{now.counts['done']}/{len(now.cells)}"
    return LINE.format(one.label, done, *live, " ".join(sorted(jobs)) or "-", one.look)


def _statuses(found: list[Found]) -> list[tuple[Found, Status | None]]:
    """The queue is asked once for all of them."""
    ask = asked_once()

    def of(r: Request) -> Status:
        cells, unknown = r.cells_or_names()
        return status(r.experiment.label, cells, unknown, ask)

    return [(one, of(one.request) if one.request else None) for one in found]


def as_json(site: Site, load: Load) -> list[dict[str, object]]:
    return [
        {"label": one.label, "look": one.look, "status": now.json() if now else None}
        for one, now in _statuses(experiments(site, load))
    ]


def which(command: str, site: Site, load: Load) -> UserError:
    """`make logs` and the like without a CONFIG: what there is."""
    names = [f"make {command} {one.request.spoken}" for one in experiments(site, load) if one.request]
    if names:
        return UserError(f"which experiment? on this scratch there is: {', '.join(f'`{name}`' for name in names[:20])}")
    return UserError(f"which experiment? say CONFIG=, one of {', '.join(map(str, _configs(load).values()))}")
