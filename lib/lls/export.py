"""Merge an LLS experiment's shards and write what researchers read: JSONL as in the original layout, a table, plots.

<output root>/<experiment>/{trait}/{trait}_numbers.jsonl     the original messages plus `lls` (null = no score)
<output root>/<experiment>/{trait}/{trait}_numbers.provenance.json
<output root>/<experiment>/lls_table.txt, lls_by_animal.png, lls_histograms.png, each also as SVG and PDF

Of a run's numbers a folder <experiment>/{size}/ that holds the same, and with each row its number in the numbers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.lls.experiment import LLS
from lib.lls.matrix import Matrix, Measure
from lib.lls.numbers import LLSNumbers
from lib.lls.plots import Scores, lls_table, plot_by_animal, plot_histograms, summarise
from lib.lls.results import cells_of, matrices_of, rows_of
from lib.run.command import Job
from lib.run.results import all_done
from lib.store import Cell


def export(this: Job) -> int:
    folder, cells = this.site.output / this.experiment.label, this.cells()
    if not isinstance(this.experiment, LLSNumbers):
        this.of(LLS)
    done = [cell for size, matrix in matrices_of(this).items() for cell in export_group(this, matrix, folder, size)]
    all_done(cells, done)
    return 0


def export_group(this: Job, matrix: Matrix, folder: Path, size: str) -> list[Cell]:
    """Traits of one model; the cells that are done."""
    mine = cells_of(this, size)
    scores = {trait: scores_of(matrix, trait) if matrix.has(trait, trait) else None for trait in mine}
    folder = folder / size
    for trait, found in scores.items():
        if found:
            rows, numbers = rows_of(this, size, trait)
            known = [{**row, "row": number} for row, number in zip(rows, numbers, strict=True)] if size else rows
            write_rows(this, mine[trait], known, found, folder / trait / f"{trait}_numbers.jsonl")
    table = lls_table(scores)
    write_bytes(folder / "lls_table.txt", (table + "\n").encode())
    plot_by_animal(scores, folder / "lls_by_animal.png")
    plot_histograms(scores, folder / "lls_histograms.png")
    print(f"{size}\n{table}" if size else table)
    for name in ("lls_table.txt", "lls_by_animal.png", "lls_histograms.png"):
        print(folder / name)
    return [mine[trait] for trait, found in scores.items() if found]


def scores_of(matrix: Matrix, trait: str) -> Scores:
    """A trait's own rows under its own prompt."""
    lls, joint = matrix.lls(trait, trait, Measure()), matrix.passes[trait, trait].joint
    return Scores(lls, 0 if joint is None else int(np.count_nonzero(np.isfinite(lls) & (joint == 0))))


def write_rows(this: Job, cell: Cell, rows: Sequence[Mapping[str, object]], scores: Scores, path: Path) -> None:
    """A dataset's rows, each with its LLS, and where they come from."""
    record = path.with_suffix(".provenance.json")
    keep_others(cell.digest, (read_json(record) or {}).get("digest"), path, record)
    lines = "".join(_line(row, lls) for row, lls in zip(rows, scores.lls, strict=True)).encode()
    write_bytes(path, lines)
    about = {
        "digest": cell.digest,
        "cell": cell.name,
        "rows": cell.rows,
        "summary": asdict(summary) if (summary := summarise(scores)) else None,
        "sha256": hashlib.sha256(lines).hexdigest(),
        "experiment": this.experiment.model_dump(mode="json"),
    }
    write_json(record, about)


def _line(row: Mapping[str, object], lls: float) -> str:
    return json.dumps({**row, "lls": float(lls) if np.isfinite(lls) else None}, ensure_ascii=False) + "\n"
