"""Log-likelihoods of one cell's rows: under its prompt and without one (lls, lls_numbers), or under one condition
(lls_cross)."""

from typing import TYPE_CHECKING

import numpy as np

from lib.base.errors import UserError
from lib.inputs.records import Messages
from lib.inputs.specs import ModelSpec
from lib.inputs.verified import checked_model
from lib.lls.experiment import LLSCross, ScoreSpec, Scoring
from lib.run.command import Job
from lib.run.task import run_rows
from lib.store import Cell
from lib.store.columns import Schema

if TYPE_CHECKING:
    from lib.lls.shift import Ready
    from lib.models.chat import Renderer
    from lib.models.decoder import Decoder

FEWEST_CHECKED = 16  # rows: a spread from fewer is a guess


def compute(this: Job) -> int:
    experiment = this.of(Scoring)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell))


def load_kernel(this: Job, experiment: Scoring, cell: Cell) -> tuple["LlsKernel", dict[str, str]]:
    """The cell's rows and model, ready to score; torch takes seconds to import, so only work that is left pays."""
    score, spec = experiment.score, experiment.model_of(cell)
    rows, places = experiment.rows(this.site.cache, cell)

    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.chat import Renderer
    from lib.models.load import device_name, load_decoder
    from lib.models.scorer import CHECK_STEP

    path = checked_model(this.site.cache, spec.id, spec.revision).path
    tokenizer, conditions = load_tokenizer(path), experiment.conditions(cell.name)
    how = experiment.rendering
    renderers = {name: Renderer(tokenizer, system, *how) for name, system in conditions.items()}
    check = CHECK_STEP if score.check_every else 0

    def load() -> tuple["Decoder", "Decoder | None"]:
        decoder = load_decoder(path, spec.dtype, score.batch_tokens, score.head_rows, check)
        return decoder, decoder.higher() if check else None

    decoder, higher = this.keep("decoder", (path, spec.dtype), load)
    kernel = LlsKernel(score, spec, experiment.schema(this.site.cache), rows, places, renderers, decoder, higher)
    if isinstance(experiment, LLSCross):
        kernel.pairs = cross_pairs(cell.name, renderers["prompt"], Renderer(tokenizer, None, *how))
    return kernel, {"device": device_name(decoder.devices[0])}


def cross_pairs(cell: str, prompt: "Renderer", base: "Renderer") -> list[int]:
    """Prefix lengths of the passes that this cell's part of the matrix would take pair by pair: each has a base pass of
    its own, so the base's cell is part of every pair and counts for nothing itself."""
    return [] if cell == "base" else [len(prompt.prefix_ids), len(base.prefix_ids)]


def check_step(every: int, rows: int, places: dict[str, np.ndarray]) -> int:
    """One row in `every`, and more of short datasets: FEWEST_CHECKED of each, if they are of equal length."""
    datasets = len(np.unique(places["dataset"])) if "dataset" in places else 1
    return min(every, max(1, rows // max(1, datasets) // FEWEST_CHECKED))


class LlsKernel:
    def __init__(
        self,
        score: ScoreSpec,
        model: ModelSpec,
        schema: Schema,
        rows: list[Messages],
        places: dict[str, np.ndarray],
        renderers: dict[str, "Renderer"],
        decoder: "Decoder",
        higher: "Decoder | None",
    ) -> None:
        from lib.lls.shift import conditions
        from lib.models.scorer import Scorer

        self.score, self.model, self.schema = score, model, schema
        self.rows, self.places, self.renderers = rows, places, renderers
        self.scorer = Scorer(decoder, score.head_rows)
        self.conditions = conditions(decoder, renderers)
        self.check_every = check_step(score.check_every, len(rows), places)
        self.pairs = [prefix.length for prefix in self.conditions.values()]
        if self.check_every and higher:
            self.checker = Scorer(higher, min(score.head_rows, 128))
            self.check_conditions = conditions(higher, renderers)

    def prepare(self, start: int, stop: int) -> tuple[int, "Ready"]:
        from lib.lls.shift import prepare

        longest = min(self.score.max_tokens, self.scorer.decoder.positions)
        return start, prepare(self.renderers, self.rows[start:stop], longest, self.score.end_of_turn)

    def compute(self, prepared: tuple[int, "Ready"]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        from lib.lls.shift import Status, shift

        start, ready = prepared
        stop = start + len(ready.status)
        before = self.scorer.computed, self.scorer.needed
        columns = shift(self.scorer, self.conditions, ready)
        columns |= {name: values[start:stop] for name, values in self.places.items()}
        self._finite(columns, start)
        if self.check_every:
            columns |= self._check(ready, start)
        facts = {"tokens_computed": self.scorer.computed - before[0], "tokens_needed": self.scorer.needed - before[1]}
        facts["tokens_pair_by_pair"] = ready.alone(self.pairs)
        facts["rows_apart"] = int(((ready.status == Status.scored) & (ready.joint == 0)).sum())
        facts |= {f"rows_{s.name}": n for s in Status if s and (n := int((ready.status == s).sum()))}
        return {name: columns[name] for name in self.schema}, facts

    def _check(self, ready: "Ready", start: int) -> dict[str, np.ndarray]:
        """Sums of every n-th row in higher precision; NaN for the others."""
        from lib.lls.shift import shift

        rows = len(ready.status)
        chosen = np.flatnonzero(np.arange(start, start + rows) % self.check_every == 0)
        sample = ready.only(chosen)
        found = shift(self.checker.one_by_one, self.check_conditions, sample) if len(chosen) else {}
        columns = {f"{name}_check": np.full(rows, np.nan) for name in self.conditions}
        for name in self.conditions:
            columns[f"{name}_check"][chosen] = found.get(f"{name}_sum", np.nan)
        return columns

    def _finite(self, columns: dict[str, np.ndarray], start: int) -> None:
        for name in self.conditions:
            broken = (columns["status"] == 0) & ~np.isfinite(columns[f"{name}_sum"])
            if broken.any():
                i = int(np.argmax(broken))
                raise UserError(
                    f"row {start + i} scored {columns[f'{name}_sum'][i]} ({name}): the weights hold NaN, or overflow "
                    f"in {self.model.dtype}; fetch them again, or try model.dtype=float32"
                )
