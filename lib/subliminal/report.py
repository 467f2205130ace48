"""A run on one page: how far it is, what came out, what it cost, what failed. Static, opens from a copied folder:

<output root>/<pipeline>_run<id>/report/index.html, report.txt, and the pictures beside them"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lib.base.atomic import disk_errors, open_file, read_file, write_bytes
from lib.base.errors import UserError
from lib.cluster import slurm
from lib.cluster.grid import LETTERS, Row, axes
from lib.cluster.pipeline import requests_of, statuses
from lib.cluster.send import Request
from lib.lora.experiment import Finetune
from lib.lora.export import export as export_students
from lib.preferences.experiment import Preferences
from lib.preferences.export import export as export_preferences
from lib.report.page import Picture, Section, page
from lib.report.tables import Column, Table, Value
from lib.run.command import Job
from lib.run.pipeline import Pipeline
from lib.run.results import Unfinished
from lib.store.markers import sweep

LOG_LINES, LOG_BYTES = 12, 1 << 16  # of a log, from its end
NEEDS_A_LOOK = ("failed", "stale", "held", "cancelled")


def report(this: Job) -> int:
    pipeline = this.of(Pipeline)
    requests = requests_of(pipeline, this.site)
    said, failed = _exported(this, requests)
    rows = statuses(requests)
    folder = this.site.output / pipeline.label / "report"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    sections = [progress(rows), results(requests, folder, said), efficiency(rows), failures(rows)]
    done, every = sum(row.now.counts["done"] for row in rows), sum(len(row.now.cells) for row in rows)
    used, left = sum(row.now.gpu_hours_used for row in rows), sum(map(_hours_left, rows))
    tiles = [
        (f"{done} of {every}", "cells are done"),
        (f"{used:.2f}", "GPU-hours used"),
        (f"{left:.2f}", "GPU-hours left"),
    ]
    facts = {"site": this.site.name, "scratch": str(this.site.scratch), "configuration": str(this.config)}
    title = f"{pipeline.name}, run {pipeline.pinned().get('run_id', '')}"
    notes = "Progress, results, cost and failures of all its stages."
    texts = [table.text() for section in sections for table in section.tables]
    write_bytes(folder / "report.txt", ("\n\n".join([title, *texts]) + "\n").encode())
    write_bytes(folder / "index.html", page(title, notes, tiles, facts, sections).encode())  # what it shows is there
    print(folder / "index.html")
    if done < every:
        failed = [f"{every - done} of {every} cells are not done, and drawn as missing; run `make resume`", *failed]
    if failed:
        raise UserError("; ".join(failed))
    return 0


def _exported(this: Job, requests: Sequence[Request]) -> tuple[list[str], list[str]]:
    """The results of all stages, as far as they are: what is to be said of them, and of that what is wrong with more
    than cells that are not done."""
    with_results = {Finetune: export_students, Preferences: export_preferences}
    said, failed = list[str](), list[str]()
    for one in requests:
        job = Job(one.experiment, one.config, this.site, None, "", False, tuple(one.overrides))
        for export in (export for kind, export in with_results.items() if isinstance(one.experiment, kind)):
            try:
                export(job)
            except UserError as e:
                said.append(f"{one.experiment.label}: {e}")
                failed += [] if isinstance(e, Unfinished) else said[-1:]
    return said, failed


def progress(rows: Sequence[Row]) -> Section:
    sizes, columns = axes(rows)
    lines: list[list[Value]] = []
    for size in sizes:
        for row in rows:
            of = {row.column(i): LETTERS[s.state] for i, s in enumerate(row.now.cells) if row.size(i) == size}
            if of:
                lines.append([size, row.now.label, *(of.get(column) for column in columns)])
    heads = [Column("size"), Column("stage"), *(Column(column, absent="") for column in columns)]
    legend = ", ".join(f"{letter} {state}" for state, letter in LETTERS.items())
    lead = "A letter a cell: " + legend + "."
    return Section("progress", "Progress", lead, tables=[Table("grid", "Cells", heads, lines)])


def results(requests: Sequence[Request], folder: Path, said: Sequence[str]) -> Section:
    """The pictures of all stages, copied beside the page."""
    pictures = []
    for one in requests:
        made = one.site.output / one.experiment.label
        for path in sorted(made.glob("plots/**/[!.]*.png")) + sorted(made.glob("[!.]*.png")):  # hidden: not whole
            name = "-".join([one.experiment.label, *path.relative_to(made).parts])
            write_bytes(folder / name, _read(path))
            pictures.append(
                Picture(name, f"{one.experiment.label}: {' '.join(path.relative_to(made).with_suffix('').parts)}")
            )
    texts = []
    for one in requests:
        made = one.site.output / one.experiment.label
        for path in sorted(made.glob("preferences.txt")) + sorted(made.glob("students.txt")):
            text = _read(path).decode(errors="replace")
            texts.append((f"{one.experiment.label}: {path.name}", f"<pre>{escape(text)}</pre>"))
    lead = (
        " ".join(said)
        if said
        else "Every figure with its controls and its interval; what is missing is drawn as missing."
    )
    return Section("results", "Results", lead, pictures=pictures, more=texts)


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}; remove it, and run this again") from None


def efficiency(rows: Sequence[Row]) -> Section:
    """What was planned, by the estimates, beside what was used; memory as sacct has it."""
    heads = [
        Column("stage"),
        Column("size"),
        Column("cells done", "d"),
        Column("of", "d"),
        Column("GPU-hours used", ".3f"),
    ]
    heads += [Column("planned", ".3f"), Column("used / planned", ".2f"), Column("most memory"), Column("asked")]
    lines: list[list[Value]] = []
    ids = {s.job.partition("_")[0] for row in rows for s in row.now.cells if s.job[:1].isdigit()}
    accounts = slurm.accounts(ids) if slurm.has_slurm() else {}
    for row in rows:
        for size in dict.fromkeys(row.size(i) for i in range(len(row.now.cells))):
            of = [s for i, s in enumerate(row.now.cells) if row.size(i) == size]
            finished = [s for s in of if s.state == "done"]
            used = sum(s.gpu_hours for s in finished)
            planned = sum(row.seconds.get(s.name, 0.0) * row.gpus.get(s.name, 1) for s in finished) / 3600
            seen = [accounts[s.job] for s in of if s.job in accounts]
            most = max(seen, key=lambda one: slurm.size(one.max_rss), default=None)
            memory = [most.max_rss or None, most.memory or None] if most else [None, None]
            ratio = used / planned if planned else None
            lines.append([row.now.label, size, len(finished), len(of), used, planned, ratio, *memory])
    lead = "GPU-hours of pieces that were kept, without loading; planned: by the estimates, of the same cells."
    return Section("cost", "Cost", lead, tables=[Table("cost", "GPU-hours and memory", heads, lines)])


def failures(rows: Sequence[Row]) -> Section:
    bad = [(row, s) for row in rows for s in row.now.cells if s.state in NEEDS_A_LOOK]
    heads = [Column("stage"), Column("cell"), Column("state"), Column("job"), Column("why")]
    lines = [[row.now.label, s.name, s.state, s.job or "-", s.note] for row, s in bad]
    more = [(f"{s.name}: {Path(s.log).name}", f"<pre>{escape(text)}</pre>") for _, s in bad if (text := _tail(s.log))]
    lead = "Nothing has failed." if not bad else "With the last lines of their logs below."
    tables = [Table("failures", "Cells that need a look", heads, lines)] if bad else []
    return Section("failures", "Failures", lead, tables=tables, more=more)


def _tail(log: str) -> str:
    """Its last lines; why they cannot be shown."""
    if not log:
        return ""
    try:
        with open_file(Path(log)) as f:
            f.seek(-min(LOG_BYTES, f.seek(0, 2)), 2)
            return "\n".join(f.read().decode(errors="replace").splitlines()[-LOG_LINES:])
    except (OSError, ValueError) as e:
        return f"{log} cannot be read: {getattr(e, 'strerror', None) or e}"


def _hours_left(row: Row) -> float:
    return sum(map(row.hours_left, row.now.cells))
