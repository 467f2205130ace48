"""An LLS experiment's merged files as one matrix of scores: what table, pictures and report are made from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from lib.inputs.records import ChatRow
from lib.lls.experiment import Fetched, LLSCross
from lib.lls.matrix import Matrix, Measure, Pass, Rescored
from lib.lls.numbers import LLSNumbers
from lib.run.command import Job
from lib.run.parents import must_be_of_these
from lib.run.results import merged_files
from lib.store import Cell, read_cell


def matrix_of(this: Job) -> Matrix:
    """The cells that are done, from their merged files."""
    experiment = this.of(Fetched)
    found = {cell.name: read_all(path) for cell, path in merged_files(this).items()}
    if isinstance(experiment, LLSCross):
        return cross(experiment, found)
    return diagonal([cell.name for cell in this.cells()], found)


def matrices_of(this: Job) -> dict[str, Matrix]:
    """Of each model: of a run's numbers by size, else of the one model under ''."""
    experiment = this.experiment
    if not isinstance(experiment, LLSNumbers):
        return {"": matrix_of(this)}
    found = {cell.name: read_all(path) for cell, path in merged_files(this).items()}
    places = list(zip(*experiment.places().values(), strict=True))
    traits = list(dict.fromkeys(trait for _, trait in places))
    return {
        size: diagonal(traits, {trait: found[f"{size}-{trait}"] for trait in traits if f"{size}-{trait}" in found})
        for size in dict.fromkeys(size for size, _ in places)
    }


def diagonal(traits: Sequence[str], found: Mapping[str, Mapping[str, np.ndarray]]) -> Matrix:
    """Each trait's own rows under its own prompt."""
    base = {trait: _pass(columns, "base") for trait, columns in found.items()}
    passes = {(trait, trait): _pass(columns, "system") for trait, columns in found.items()}
    rescored = {
        (trait, trait): again(columns["system_check"], columns["base_check"])
        for trait, columns in found.items()
        if "system_check" in columns
    }
    names = tuple(traits)
    return Matrix(names, names, base, passes, rescored, wanted=tuple((t, t) for t in names))


def scores_of_numbers(
    experiment: LLSNumbers, cache: Path, cell: Cell, measure: Measure
) -> tuple[np.ndarray, np.ndarray]:
    """Of a cell that is done: rows of its numbers, and the LLS of each, NaN where it has none."""
    schema = experiment.schema(cache)
    columns = read_cell(cell, schema, schema)
    return columns["row"], diagonal([cell.name], {cell.name: columns}).lls(cell.name, cell.name, measure)


def cross(experiment: LLSCross, found: dict[str, dict[str, np.ndarray]]) -> Matrix:
    """Every condition's cell holds the rows of all datasets: taken apart, in each dataset's own order."""
    prompts, datasets = tuple(experiment.all_prompts()), tuple(experiment.datasets_of)
    parts = {name: {d: take(columns, n) for n, d in enumerate(datasets)} for name, columns in found.items()}
    base = {d: _pass(columns, "prompt") for d, columns in parts.pop("base", {}).items()}
    passes = {(p, d): _pass(columns, "prompt") for p, of in parts.items() if base for d, columns in of.items()}
    rescored = {}
    for (p, d), columns in (((p, d), c) for p, of in parts.items() for d, c in of.items()):
        if base and "prompt_check" in columns:
            rescored[p, d] = again(columns["prompt_check"], take(found["base"], datasets.index(d))["prompt_check"])
    return Matrix(prompts, datasets, base, passes, rescored)


def take(columns: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The rows of one dataset in its order; values of single tokens follow their rows."""
    here = np.flatnonzero(columns["dataset"] == number)
    here = here[np.argsort(columns["row"][here])]
    ends = np.cumsum(columns["tokens"])
    out = {}
    for name, values in columns.items():
        if name.endswith("_logp"):
            spans = [values[ends[i] - columns["tokens"][i] : ends[i]] for i in here]
            out[name] = np.concatenate([*spans, np.empty(0, values.dtype)])
        else:
            out[name] = values[here]
    return out


def read_all(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r", locking=False) as f:
        return {name: f[name][:] for name in f}


def _pass(columns: Mapping[str, np.ndarray], who: str) -> Pass:
    """Columns <who>_sum, and <who>_end and <who>_logp where they were stored."""
    optional = columns.get(f"{who}_end"), columns.get(f"{who}_logp"), columns.get("joint")
    return Pass(columns["status"], columns["tokens"], columns[f"{who}_sum"], *optional)


def again(system: np.ndarray, base: np.ndarray) -> Rescored:
    """The rows that were scored again in higher precision; the others hold NaN."""
    rows = np.flatnonzero(np.isfinite(system) & np.isfinite(base))
    return Rescored(rows, (system - base)[rows])


def cells_of(this: Job, size: str) -> dict[str, Cell]:
    """Of one model, as matrices_of has it: by trait or condition."""
    cells, load = this.cells(), this.experiment.load_of
    return {cell.name.removeprefix(f"{size}-"): cell for cell in cells if not size or load(cell) == size}


def rows_of(this: Job, size: str, dataset: str) -> tuple[list[ChatRow], list[int]]:
    """A dataset's rows, and the number of each where it is from."""
    experiment, cache = this.experiment, this.site.cache
    if not isinstance(experiment, LLSNumbers):
        found = this.of(Fetched).messages(cache, dataset)
        return [{"messages": messages} for messages in found], list(range(len(found)))
    cell = cells_of(this, size)[dataset]
    must_be_of_these(cell)
    found, places = experiment.rows(cache, cell)
    return [{"messages": messages} for messages in found], places["row"].tolist()
