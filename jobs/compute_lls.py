"""Log-likelihood shift of one cell: its rows under its system prompt against no system prompt, shard by shard."""

from typing import Any

import numpy as np

from lib.errors import UserError, exit_with
from lib.experiments import LLS
from lib.job import Job, job
from lib.run import run_cell
from lib.store import Cell, dataset_input, model_input
from lib.store.inputs import read_rows


def main() -> int:
    this = job("compute_lls", __doc__)
    experiment, cell = this.of(LLS), this.cell()
    return run_cell(
        cell,
        experiment.schema(),
        lambda: load_kernel(this, experiment, cell),
        shard_rows=experiment.run.shard_rows,
        log_seconds=experiment.run.log_seconds,
        gpus=experiment.run.gpus,
    )


def load_kernel(this: Job, experiment: LLS, cell: Cell) -> tuple["LlsKernel", dict[str, Any]]:
    """The cell's rows and model, ready to score; torch takes seconds to import, so only work that is left pays."""
    cache, spec, score = this.site.cache, experiment.dataset.named(trait=cell.name), experiment.score
    rows = read_rows(cache, dataset_input(cache, spec.id, spec.revision, spec.split), experiment.max_rows)

    from lib.models.chat import Renderer
    from lib.models.load import device_name, load_decoder, load_tokenizer

    path = model_input(cache, experiment.model.id, experiment.model.revision).path
    tokenizer = load_tokenizer(path)
    renderers = {
        "system": Renderer(tokenizer, experiment.prompt_for(cell.name), experiment.base),
        "base": Renderer(tokenizer, None, experiment.base),
    }
    decoder = load_decoder(path, experiment.model.dtype, score.batch_tokens, score.head_rows)
    kernel = LlsKernel(experiment, [row["messages"] for row in rows], renderers, decoder)
    return kernel, {"device": device_name(decoder.devices[0])}


class LlsKernel:
    def __init__(self, experiment: LLS, rows: list[Any], renderers: dict[str, Any], decoder: Any) -> None:
        from lib.scoring.logprob import Scorer
        from lib.scoring.shift import conditions

        self.experiment, self.rows, self.renderers = experiment, rows, renderers
        self.schema, score = experiment.schema(), experiment.score
        self.scorer = Scorer(decoder, score.head_rows)
        self.conditions = conditions(decoder, renderers)
        if score.check_every:
            higher = decoder.higher(min(score.batch_tokens, score.max_tokens))
            self.checker = Scorer(higher, min(score.head_rows, 128))
            self.check_conditions = conditions(higher, renderers)

    def prepare(self, start: int, stop: int) -> Any:
        from lib.scoring.shift import prepare

        score = self.experiment.score
        return start, prepare(self.renderers, self.rows[start:stop], score.max_tokens, score.end_of_turn)

    def compute(self, prepared: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        from lib.scoring.shift import Status, shift

        start, ready = prepared
        before = self.scorer.computed, self.scorer.needed
        columns = shift(self.scorer, self.conditions, ready)
        columns["row"] = np.arange(start, start + len(ready.status), dtype=np.int32)
        self._finite(columns)
        if self.experiment.score.check_every:
            columns |= self._check(ready, columns["row"])
        facts = {"tokens_computed": self.scorer.computed - before[0], "tokens_needed": self.scorer.needed - before[1]}
        facts |= {f"rows_{s.name}": n for s in Status if s and (n := int((ready.status == s).sum()))}
        return {name: columns[name] for name in self.schema}, facts

    def _check(self, ready: Any, row: np.ndarray) -> dict[str, np.ndarray]:
        """Sums of every n-th row in higher precision; NaN for the others."""
        from lib.scoring.shift import shift

        chosen = np.flatnonzero(row % self.experiment.score.check_every == 0)
        found = shift(self.checker, self.check_conditions, ready.only(chosen)) if len(chosen) else {}
        columns = {}
        for name in ("system", "base"):
            columns[f"{name}_check"] = np.full(len(row), np.nan)
            columns[f"{name}_check"][chosen] = found.get(f"{name}_sum", np.nan)
        return columns

    def _finite(self, columns: dict[str, np.ndarray]) -> None:
        broken = (columns["status"] == 0) & ~np.isfinite(columns["system_sum"] + columns["base_sum"])
        if broken.any():
            i = int(np.argmax(broken))
            raise UserError(
                f"row {columns['row'][i]} scored {columns['system_sum'][i]} and {columns['base_sum'][i]}: the weights "
                f"hold NaN, or overflow in {self.experiment.model.dtype}; fetch them again, or try model.dtype=float32"
            )


if __name__ == "__main__":
    exit_with(main)
