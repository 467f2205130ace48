"""Which of a teacher's answers a student is trained on: drawn from all valid ones, or from a part of them by LLS."""

from pathlib import Path

import numpy as np

from lib.base.errors import UserError
from lib.lls.matrix import Measure
from lib.lls.results import scores_of_numbers
from lib.lls.select import CLEAN, part_of
from lib.lora.experiment import Finetune
from lib.numbers.dataset import training_rows, valid_rows
from lib.run.extent import settled
from lib.run.parents import must_be_of_these
from lib.store import Cell


def rows_of(experiment: Finetune, cache: Path, cell: Cell, reasons: np.ndarray) -> list[int]:
    """Rows of the numbers' cell in the order of training."""
    e, part, valid = experiment, experiment.parts[cell.index][2], valid_rows(reasons)
    wanted = f"and {e.rows} are wanted for training: lower rows"
    if not e.select or not part or part == CLEAN:
        few = f"of {len(reasons)} answers are valid, {wanted}, or generate more (prompts)"
        return training_rows(valid, e.rows, e.seed_used, few)
    rows, values = _scores(e, cache, cell.parents[1])
    if not set(rows) <= set(valid):
        raise UserError(f"{cell.parents[1].spoken} scores rows that {cell.parents[0].spoken} does not hold as valid")
    pool = rows[part_of(part, e.select.share, values)].tolist()
    scored = int(np.isfinite(values).sum())
    widen = ", raise select.share" if part in ("top", "bottom") else ""
    few = f"of {scored} scored answers ({len(valid)} are valid) are of the part {part}, {wanted}{widen}"
    return training_rows(pool, e.rows, e.seed_used, f"{few}, or generate more (prompts)")


def _scores(e: Finetune, cache: Path, scored: Cell) -> tuple[np.ndarray, np.ndarray]:
    assert e.select
    must_be_of_these(scored)
    return scores_of_numbers(e.scores, cache, settled(scored), Measure.parse(e.select.measure))
