"""Unstructured pruning of a loaded model, pattern after pattern; what was zeroed is read from its folder again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.attribution.experiment import Attribution
from lib.inputs.samples import read_samples
from lib.inputs.verified import checked_model
from lib.pruning.sparsity import PATTERN, Sparsity, Way
from lib.pruning.texts import Texts, stacked
from lib.run.command import Job
from lib.run.results import merged_file
from lib.run.task import run_rows
from lib.store import Cell, read_cell


def compute(this: Job) -> int:
    experiment = this.of(Sparsity)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell))


def load_kernel(this: Job, experiment: Sparsity, cell: Cell) -> tuple["WeightKernel", dict[str, Any]]:
    from lib.pruning.subject import Subject, load_subject

    cache = this.site.cache
    path = checked_model(cache, experiment.base.model.id, experiment.base.model.revision).path
    subject: Subject = this.keep(
        "subject", path, lambda: load_subject(cache, experiment.base.model, experiment.evaluate, path)
    )
    texts = this.keep(
        "texts",
        experiment.label,
        lambda: Texts(experiment.evaluate, cache, lambda name: experiment.set_of(cache, name), path),
    )
    return WeightKernel(experiment, cache, cell, subject, texts, Path(path)), {"device": subject.device}


class WeightKernel:
    def __init__(self, experiment: Sparsity, cache: Path, cell: Cell, subject: Any, texts: Texts, folder: Path) -> None:
        from lib.checkpoint.layers import choose
        from lib.pruning.weights import WeightPruner

        self.experiment, self.cache, self.cell, self.subject, self.texts = experiment, cache, cell, subject, texts
        self.way: Way | None = experiment.ways.get(cell.name)
        self.pruner = WeightPruner(subject.weights, subject.family, folder)
        self.names = choose(subject.family, self.pruner.linears, experiment.layers)

    def prepare(self, start: int, stop: int) -> list[str]:
        return self.experiment.patterns_of(self.cell.name)[start:stop]

    def compute(self, prepared: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = []
        total = sum(self.pruner.linears[name].weight.part.numel() for name in self.names)
        for pattern in prepared:
            with self._pruned(pattern) as zeros:
                looked = self.texts.look(self.subject.log_probs)
                tasks = self.subject.tasks()
            rows.append({"zeros": zeros, "weights": total, **looked, **tasks})
        return stacked(self.experiment.schema(self.cache), rows), {}

    @contextmanager
    def _pruned(self, pattern: str) -> Iterator[int]:
        """How many weights are zero inside."""
        from lib.pruning.sequential import sequential_wanda
        from lib.pruning.weights import masks_by

        if self.way is None:
            yield 0
        elif self.way.method == "sequential":
            samples = read_samples(self.cache, self.experiment.set_of(self.cache, f"general-{self.way.seed}"))
            try:
                ids = [row.tolist() for row in samples.ids]
                zeros = sequential_wanda(self.subject.model, self.subject.family, self.pruner, ids, rule_of(pattern))
                yield sum(zeros.values())
            finally:
                self.pruner.restore()
        else:
            device = self.subject.model.device
            with self.pruner.applied(masks_by(self._scores(), rule_of(pattern), device)) as zeros:
                yield sum(zeros.values())

    def _scores(self) -> list[Any]:
        """Of every weight, by the cell's method."""
        import torch

        from lib.attribution.wanda import norms
        from lib.pruning.scores import stored_scores, wanda_scores

        assert self.way
        linears = self.pruner.linears
        if self.way.method == "magnitude":
            widths = {name: linears[name].weight.part.shape[1] for name in self.names}
            return list(wanda_scores(linears, {name: torch.ones(width) for name, width in widths.items()}))
        source = self.experiment.sources[self.way.method].experiment
        assert isinstance(source, Attribution)
        parent, schema = self.cell.parents[0], source.schema(self.cache)
        if self.way.method == "lrp":  # the mean over samples has the order of their sum
            return list(
                stored_scores([(merged_file(parent, schema, source.science_json()), 1.0)], "signed", self.names, True)
            )
        found = read_cell(parent, schema, ["sumsq", "tokens", "samples"])
        total, tokens = found["sumsq"].sum(0, dtype="float64"), int(found["tokens"].sum())
        parts = {part.name: part for part in source.layout(self.cache)}
        norm = {}
        for name in self.names:
            mine = total[parts[name].first_input : parts[name].first_input + parts[name].inputs]
            norm[name] = norms(torch.from_numpy(mine), tokens, int(found["samples"].sum()), "rms")
        return list(wanda_scores(linears, norm))


def rule_of(pattern: str) -> Any:
    from lib.pruning.weights import Blocks, Lowest

    found = PATTERN.fullmatch(pattern)
    assert found
    return Blocks(int(found[3]), int(found[4])) if found[3] else Lowest(found[1], float(found[2]))  # type: ignore[arg-type]
