"""Merge an LLS experiment's shards and write what researchers read: JSONL as in the original layout, a table, plots.

<output root>/<experiment>/{trait}/{trait}_numbers.jsonl     the original messages plus `lls` (null = no score)
<output root>/<experiment>/{trait}/{trait}_numbers.provenance.json
<output root>/<experiment>/lls_table.txt, lls_by_animal.png, lls_histograms.png"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.base.errors import UserError, exit_with
from lib.inputs.records import dataset_input, read_rows
from lib.lls.experiment import LLS
from lib.lls.plots import Scores, lls_table, plot_by_animal, plot_histograms, summarise
from lib.run.command import Job, job
from lib.store import Cell, gaps, merge, scan


def main() -> int:
    this = job("export_lls", __doc__.splitlines()[0], indexed=False)
    experiment = this.of(LLS)
    folder = this.site.output / experiment.label
    cells = this.cells()
    missing = [c for c in cells if gaps(scan(c.path, c.digest)[0], c.rows)]
    scores: dict[str, Scores | None] = {c.name: None for c in cells}
    for cell in cells:
        if cell not in missing:
            scores[cell.name] = export(this, experiment, cell, folder)
    table = lls_table(scores)
    write_bytes(folder / "lls_table.txt", (table + "\n").encode())
    plot_by_animal(scores, folder / "lls_by_animal.png")
    plot_histograms(scores, folder / "lls_histograms.png")
    print(table)
    for name in ("lls_table.txt", "lls_by_animal.png", "lls_histograms.png"):
        print(folder / name)
    if missing:
        names = ", ".join(c.name for c in missing)
        raise UserError(
            f"{len(missing)} of {len(cells)} cells are not done and not exported: {names}; run `make resume`"
        )
    return 0


def export(this: Job, experiment: LLS, cell: Cell, folder: Path) -> Scores:
    """One cell: its merged file, its JSONL, and its numbers for the table and the plots."""
    merged = merge(cell, experiment.schema(this.site.cache), experiment.science_json())
    with h5py.File(merged, "r", locking=False) as f:
        scores = Scores(f["system_sum"][:], f["base_sum"][:], f["tokens"][:], f["joint"][:])
    spec = experiment.dataset.named(trait=cell.name)
    rows = read_rows(
        this.site.cache, dataset_input(this.site.cache, spec.id, spec.revision, spec.split), experiment.max_rows
    )
    path = folder / cell.name / f"{cell.name}_numbers.jsonl"
    record = path.with_suffix(".provenance.json")
    keep_others(cell.digest, (read_json(record) or {}).get("digest"), path, record)
    lines = "".join(_line(row, value) for row, value in zip(rows, scores.lls, strict=True)).encode()
    write_bytes(path, lines)
    write_json(record, _provenance(experiment, cell, lines, scores))
    return scores


def _line(row: dict[str, Any], lls: float) -> str:
    return json.dumps({**row, "lls": float(lls) if np.isfinite(lls) else None}, ensure_ascii=False) + "\n"


def _provenance(experiment: LLS, cell: Cell, lines: bytes, scores: Scores) -> dict[str, Any]:
    return {
        "digest": cell.digest,
        "cell": cell.name,
        "rows": cell.rows,
        "summary": asdict(summary) if (summary := summarise(scores)) else None,
        "sha256": hashlib.sha256(lines).hexdigest(),
        "experiment": experiment.model_dump(mode="json"),
    }


if __name__ == "__main__":
    exit_with(main)
