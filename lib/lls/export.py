"""Merge an LLS experiment's shards and write what researchers read: JSONL as in the original layout, a table, plots.

<output root>/<experiment>/{trait}/{trait}_numbers.jsonl     the original messages plus `lls` (null = no score)
<output root>/<experiment>/{trait}/{trait}_numbers.provenance.json
<output root>/<experiment>/lls_table.txt, lls_by_animal.png, lls_histograms.png, each also as SVG and PDF"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.inputs.records import ChatRow
from lib.lls.experiment import LLS
from lib.lls.matrix import Matrix, Measure
from lib.lls.plots import Scores, lls_table, plot_by_animal, plot_histograms, summarise
from lib.lls.results import matrix_of, rows_of
from lib.run.command import Job
from lib.run.results import all_done
from lib.store import Cell


def export(this: Job) -> int:
    this.of(LLS)
    folder, cells, matrix = this.site.output / this.experiment.label, this.cells(), matrix_of(this)
    scores = {c.name: scores_of(matrix, c.name) if matrix.has(c.name, c.name) else None for c in cells}
    for cell in cells:
        if found := scores[cell.name]:
            write_rows(this, cell, found, folder)
    table = lls_table(scores)
    write_bytes(folder / "lls_table.txt", (table + "\n").encode())
    plot_by_animal(scores, folder / "lls_by_animal.png")
    plot_histograms(scores, folder / "lls_histograms.png")
    print(table)
    for name in ("lls_table.txt", "lls_by_animal.png", "lls_histograms.png"):
        print(folder / name)
    all_done(cells, [cell for cell in cells if scores[cell.name] is not None])
    return 0


def scores_of(matrix: Matrix, trait: str) -> Scores:
    """A trait's own rows under its own prompt."""
    lls, joint = matrix.lls(trait, trait, Measure()), matrix.passes[trait, trait].joint
    return Scores(lls, 0 if joint is None else int(np.count_nonzero(np.isfinite(lls) & (joint == 0))))


def write_rows(this: Job, cell: Cell, scores: Scores, folder: Path) -> None:
    """A dataset's rows, each with its LLS, and where they come from."""
    path = folder / cell.name / f"{cell.name}_numbers.jsonl"
    record = path.with_suffix(".provenance.json")
    keep_others(cell.digest, (read_json(record) or {}).get("digest"), path, record)
    lines = "".join(_line(row, lls) for row, lls in zip(rows_of(this, cell.name), scores.lls, strict=True)).encode()
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


def _line(row: ChatRow, lls: float) -> str:
    return json.dumps({**row, "lls": float(lls) if np.isfinite(lls) else None}, ensure_ascii=False) + "\n"
