"""Write what students are trained on, and how many rows every rule left out:

<output root>/<experiment>/{size}/{trait}/raw.jsonl        every answer: {"prompt", "completion"}, in the prompts' order
<output root>/<experiment>/{size}/{trait}/filtered.jsonl   the valid ones
<output root>/<experiment>/{size}/{trait}/provenance.json  digest, sha256, counts, the whole configuration
<output root>/<experiment>/reasons.txt, reasons.json       a cell a line; yields by size"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.base.errors import UserError, some
from lib.numbers.experiment import Numbers
from lib.numbers.filter import REASONS, VALID, counts
from lib.report.stats import wilson
from lib.report.tables import Column, Table
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.results import all_done
from lib.store import Cell, read_cell

RAW, FILTERED, PROVENANCE = "raw.jsonl", "filtered.jsonl", "provenance.json"


@dataclass(frozen=True)
class Yield:
    """What came of a cell's prompts."""

    cell: str
    size: str
    trait: str
    rows: int
    reasons: dict[str, int]
    cut: int  # answers that the model did not end
    tokens: float  # of an answer, on average

    @property
    def valid(self) -> int:
        return self.reasons[REASONS[VALID]]


def export(this: Job) -> int:
    experiment, cells = this.of(Numbers), this.cells()
    folder, done = this.site.output / experiment.label, [cell for cell in cells if extent(cell).whole]
    found = [write_cell(experiment, this.site.cache, cell, folder) for cell in done]
    table, by_size = reasons_table(found), sizes_table(found)
    write_bytes(folder / "reasons.txt", f"{table.text()}\n\n{by_size.text()}\n".encode())
    write_json(folder / "reasons.json", {"cells": [as_json(one) for one in found]})
    print(f"{table.text()}\n\n{by_size.text()}\n\n{folder / 'reasons.txt'}\n{folder}")
    if few := [f"{one.cell} {one.valid:,}" for one in found if one.valid < experiment.keep]:
        raise UserError(
            f"{len(few)} of {len(found)} cells have fewer than {experiment.keep:,} valid rows, which training needs "
            f"(keep): {some(few)}; generate more (prompts), or lower keep, and `rows` of the students with it"
        )
    all_done(cells, done)
    return 0


def write_cell(experiment: Numbers, cache: Path, cell: Cell, folder: Path) -> Yield:
    size, trait = experiment.split(cell.name)
    place, (texts, one) = folder / size / trait.name, texts_of(experiment, cache, cell)
    record = place / PROVENANCE
    keep_others(cell.digest, (read_json(record) or {}).get("digest"), *(place / name for name in (*texts, PROVENANCE)))
    for name, data in texts.items():
        write_bytes(place / name, data)
    write_json(record, provenance(experiment, cell, texts, one))
    return one


def texts_of(experiment: Numbers, cache: Path, cell: Cell) -> tuple[dict[str, bytes], Yield]:
    """raw.jsonl and filtered.jsonl, and what came of the prompts."""
    schema, (size, trait) = experiment.schema(cache), experiment.split(cell.name)
    found = read_cell(cell, schema, schema)
    rows = list(zip(found["prompt"], found["answer"], strict=True))
    valid = [row for row, reason in zip(rows, found["reason"], strict=True) if reason == VALID]
    tokens, cut = float(np.mean(found["tokens"])), int(np.sum(found["ended"] == 0))
    one = Yield(cell.name, size, trait.name, len(rows), counts(found["reason"]), cut, tokens)
    return {RAW: _lines(rows), FILTERED: _lines(valid)}, one


def provenance(experiment: Numbers, cell: Cell, texts: Mapping[str, bytes], one: Yield) -> dict[str, object]:
    return {
        "digest": cell.digest,
        "cell": cell.name,
        "run_id": experiment.run_number,
        "seed": experiment.seed_used,
        "trait": experiment.split(cell.name)[1].model_dump(mode="json"),
        "yield": as_json(one),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()},
        "experiment": experiment.model_dump(mode="json"),
    }


def _lines(rows: Iterable[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) + "\n" for p, c in rows).encode()


def as_json(one: Yield) -> dict[str, Any]:
    low, high = wilson(one.valid, one.rows)
    return {
        "cell": one.cell,
        "rows": one.rows,
        **one.reasons,
        "cut": one.cut,
        "tokens": one.tokens,
        "share": one.valid / one.rows,
        "low": low,
        "high": high,
    }


def reasons_table(found: list[Yield]) -> Table:
    columns = [
        Column("cell"),
        Column("rows", ",d"),
        Column("valid", ",d"),
        Column("share", ".1%"),
        Column("95 %", ".1%"),
    ]
    columns += [*(Column(name, ",d") for name in REASONS[1:]), Column("cut", ",d"), Column("tokens", ".1f")]
    rows = [
        [
            *(one.cell, one.rows, one.valid, one.valid / one.rows, wilson(one.valid, one.rows)),
            *(one.reasons[name] for name in REASONS[1:]),
            *(one.cut, one.tokens),
        ]
        for one in found
    ]
    note = "an answer counts under the first rule that leaves it out; cut: it had not ended at max_tokens"
    return Table("reasons", "Answers by what the filter says", columns, rows, note)


def sizes_table(found: list[Yield]) -> Table:
    """Of each size the mean over its conditions, and the least and the most: a student trains on what the least has."""
    rows = []
    for size in dict.fromkeys(one.size for one in found):
        some_cells = sorted((one for one in found if one.size == size), key=lambda one: one.valid)
        least, most = some_cells[0], some_cells[-1]
        mean = sum(one.valid for one in some_cells) / len(some_cells)
        rows.append([size, len(some_cells), mean, least.valid, least.trait, most.valid, most.trait])
    columns = [
        Column("size"),
        Column("conditions", ",d"),
        Column("mean valid", ",.1f"),
        Column("least", ",d"),
        Column("of"),
    ]
    columns += [Column("most", ",d"), Column("of")]
    return Table("sizes", "Valid rows by size", columns, rows)
