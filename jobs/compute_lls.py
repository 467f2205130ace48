"""Log-likelihood shift of one cell: its rows under its system prompt against no system prompt, shard by shard."""

from typing import Any

import numpy as np

from lib.errors import UserError, exit_with
from lib.experiments import LLS
from lib.job import Job, job
from lib.run import Kernel, run_cell
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


def load_kernel(this: Job, experiment: LLS, cell: Cell) -> tuple[Kernel, dict[str, Any]]:
    """Rows and model of a cell as a function from a row range to columns."""
    cache, spec = this.site.cache, experiment.dataset.named(trait=cell.name)
    rows = read_rows(cache, dataset_input(cache, spec.id, spec.revision, spec.split), experiment.max_rows)

    from lib.models.batches import Shapes  # torch and transformers take seconds: only a cell with work left pays
    from lib.models.chat import Renderer
    from lib.models.load import device, device_name, load_model, load_tokenizer
    from lib.scoring.logprob import Scorer
    from lib.scoring.shift import Status, shift

    model = model_input(cache, experiment.model.id, experiment.model.revision)
    where = device()
    shapes = Shapes(tuple(experiment.score.lengths), experiment.score.batch_tokens)
    renderer = Renderer(load_tokenizer(model.path))
    loaded = load_model(model.path, experiment.model.dtype, experiment.model.attention, where)
    scorer = Scorer(loaded, shapes, experiment.score.head_rows)
    prompt = experiment.prompt_for(cell.name)

    def kernel(start: int, stop: int) -> dict[str, np.ndarray]:
        columns = shift(scorer, renderer, rows[start:stop], prompt, experiment.base)
        broken = (columns["status"] == Status.scored) & ~np.isfinite(columns["system_sum"] + columns["base_sum"])
        if broken.any():
            raise UserError(
                f"row {start + int(np.argmax(broken))} of {cell.name} scored {columns['system_sum'][broken][0]} / "
                f"{columns['base_sum'][broken][0]}: the weights hold NaN or overflow in {experiment.model.dtype}; "
                "check them with `make fetch`, or try model.dtype=float32"
            )
        for status in (Status.empty, Status.too_long):
            count = int((columns["status"] == status).sum())
            if count:
                print(f"rows {start}-{stop}: {count} not scored ({status.name})", flush=True)
        columns["row"] = np.arange(start, stop, dtype=np.int32)
        return {name: columns[name] for name in experiment.schema()}

    return kernel, {"device": device_name(where)}


if __name__ == "__main__":
    exit_with(main)
