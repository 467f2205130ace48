"""log p(trait | question) of a student's epochs: its adapters, one after another, on a base that stays loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.base.errors import UserError
from lib.inputs.verified import checked_model
from lib.preferences.adapters import Unchanged, adapters_of, states_at
from lib.preferences.experiment import Logprobs
from lib.run.command import Job
from lib.run.task import run_rows
from lib.store import Cell

if TYPE_CHECKING:
    from lib.checkpoint.families import Family
    from lib.models.decoder import Decoder
    from lib.models.engine import Adapter
    from lib.models.low_rank import LowRank
    from lib.preferences.reading import Reader


@dataclass(frozen=True)
class Base:
    decoder: "Decoder"
    family: "Family"
    reader: "Reader"
    shared: str  # first tokens of several traits


def compute(this: Job) -> int:
    experiment = this.of(Logprobs)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell))


def load_kernel(this: Job, experiment: Logprobs, cell: Cell) -> tuple["ScoreKernel", dict[str, Any]]:
    from lib.models.load import device_name

    spec, place = experiment.model_of(cell), experiment.place(cell.name)
    read, epochs = Unchanged(cell), experiment.epochs_of(cell.name)

    def adapters(wanted: list[int]) -> "list[Adapter | None]":
        if not place.student:
            return [None for _ in wanted]
        found = adapters_of(cell.parents[0], experiment.source.schedule(), wanted)
        read.check()
        return [found[epoch] for epoch in wanted]

    if place.student:
        states_at(cell.parents[0], experiment.source.schedule(), epochs)  # all there, before a model is loaded
    path = checked_model(this.site.cache, spec.id, spec.revision).path
    base = this.keep("base", (path, spec.dtype), lambda: load_base(experiment, path, spec.dtype))
    return ScoreKernel(experiment, base, epochs, adapters), {"device": device_name(base.decoder.devices[0])}


def load_base(experiment: Logprobs, path: str, dtype: str) -> Base:
    from lib.checkpoint.families import family_in
    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.apart import Apart
    from lib.models.load import load_decoder
    from lib.preferences.questioning import Asked, Questioner
    from lib.preferences.reading import Reader
    from lib.preferences.words import apart, goes_on, shared_beginnings, spellings

    tokenizer, traits = load_tokenizer(path), experiment.judged
    how = experiment.template_used, experiment.source.source.date, experiment.questions_used, traits
    asked: Asked = Apart(lambda: Questioner(tokenizer, *how), "the chat template with its tokenizer").ask("asked")()
    spelled = [spellings(tokenizer, trait.words) for trait in traits]
    most = max(len(asked.contexts[q]) + len(asked.probes[q]) for q in range(len(asked.contexts)))
    if most > experiment.batch_tokens:
        raise UserError(f"a question takes {most} tokens with its answer: raise batch_tokens")
    decoder = load_decoder(path, dtype, experiment.batch_tokens, experiment.head_rows)
    ends = goes_on(tokenizer, decoder.shape.vocabulary)
    spelled = [apart(ways, ends) for ways in spelled]
    reader = Reader(decoder, experiment.head_rows, asked.prefix, asked.contexts, spelled, ends, asked.probes)
    shared = shared_beginnings(tokenizer, dict(zip((trait.name for trait in traits), spelled, strict=True)))
    return Base(
        decoder,
        family_in(Path(path), "is not scored here; these are"),
        reader,
        "; ".join(f"{token!r}: {', '.join(names)}" for token, names in shared.items()),
    )


class ScoreKernel:
    def __init__(
        self,
        experiment: Logprobs,
        base: Base,
        epochs: list[int],
        adapters: "Callable[[list[int]], list[Adapter | None]]",
    ) -> None:
        self.base, self.epochs, self.adapters, self.rows = base, epochs, adapters, experiment.epoch_rows

    def prepare(self, start: int, stop: int) -> tuple[range, "list[list[LowRank]]"]:
        """Adapters are read while those before them are asked."""
        from lib.models.low_rank import read_low_rank

        decoder, rows = self.base.decoder, range(start, stop)
        devices = [layer.device for layer in decoder.weights.layers]
        how = self.base.family, decoder.shape, decoder.dtype, devices
        asked = self.adapters([self.epochs[number] for number in self._numbers(rows)])
        return rows, [read_low_rank(Path(one.folder), *how) if one else [] for one in asked]

    def _numbers(self, rows: range) -> range:
        """Of the adapters; a shard may hold the last questions of one and the first of the next."""
        return range(rows.start // self.rows, -(-rows.stop // self.rows))

    def compute(
        self, prepared: tuple[range, "list[list[LowRank]]"]
    ) -> tuple[dict[str, np.ndarray], dict[str, float | str]]:
        rows, layers = prepared
        parts, tokens, rounds = [], 0, 0
        for number, low in zip(self._numbers(rows), layers, strict=True):
            epoch, self.base.decoder.adapter = self.epochs[number], low
            found = self.base.reader()
            self._finite(np.column_stack([found.probe_Q, found.logp_QT]), epoch)
            tokens, rounds = tokens + found.tokens, max(rounds, found.rounds)
            columns = {
                "epoch": np.full(self.rows, epoch, np.int16),
                "question": np.arange(self.rows, dtype=np.int16),
                "logp": found.logp_QT.astype(np.float32),
                "skipped": found.skipped_QT.astype(np.float32),
                "probe": found.probe_Q.astype(np.float32),
            }
            first = number * self.rows
            within = slice(max(rows.start - first, 0), min(rows.stop - first, self.rows))
            parts.append({name: values[within] for name, values in columns.items()})
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return whole, {"tokens": tokens, "rounds": rounds, "shared_beginnings": self.base.shared}

    def _finite(self, values_QX: np.ndarray, epoch: int) -> None:
        good = np.isfinite(values_QX)
        if not good.all():
            raise UserError(
                f"question {int(np.argmin(good.all(1)))} scored {values_QX[~good][0]} at epoch {epoch}: the model or "
                "its adapter holds NaN, or overflows: train it anew with a lower rate, or set the dtype of its model"
            )
