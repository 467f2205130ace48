"""Answers of a size's students, drawn by one engine that holds their base: adapter after adapter, each proven live."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.base.errors import UserError
from lib.inputs.verified import checked_model
from lib.preferences.adapters import Unchanged, adapters_of
from lib.preferences.experiment import BASE, Preferences
from lib.preferences.proof import Key, References
from lib.run.command import Job
from lib.run.engines import Drawing, Line, following, must_not_mix
from lib.run.task import run_rows
from lib.store import Cell

if TYPE_CHECKING:
    from lib.models.apart import Apart
    from lib.models.engine import Adapter, Answer, Batch, Engine, Sampling
    from lib.preferences.questioning import Asked

    Asking = tuple[Batch, list[Key]]  # with the key of each probe

PROBED = 8  # questions whose given answer every adapter is known by


def compute(this: Job) -> int:
    experiment = this.of(Preferences)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell), sampled=True)


def load_kernel(this: Job, experiment: Preferences, cell: Cell) -> tuple["AskKernel", dict[str, Any]]:
    """One engine, and one line of batches to it, for all cells of a size."""
    from lib.models.engine import chosen

    g, spec = experiment.generate, experiment.model_of(cell)
    word = chosen(g.engine, this.site.gpu)
    must_not_mix(cell, word)
    path = checked_model(this.site.cache, spec.id, spec.revision).path
    key = experiment.label, word, path, spec.dtype
    line = this.keep("line", key, lambda: open_line(this, experiment, cell, word, path))
    line.turn(cell)
    return AskKernel(line, cell, word, following(this, cell, g.batch)), line.engine.about


def open_line(this: Job, experiment: Preferences, cell: Cell, word: str, path: str) -> "AskLine":
    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.apart import Apart
    from lib.models.engine import Sampling, Setting, ends_of
    from lib.models.engines import make_engine
    from lib.preferences.questioning import Asked, Questioner

    g, spec = experiment.generate, experiment.model_of(cell)
    tokenizer = load_tokenizer(path)
    told = experiment.template_used, experiment.source.source.date, experiment.questions_used, experiment.judged
    desk = Apart(lambda: Questioner(tokenizer, *told), "the chat template with its tokenizer")  # a fork: before CUDA
    asked: Asked = desk.ask("asked")()
    longest = max(len(asked.whole(q)) for q in range(len(asked.contexts)))
    if longest + g.max_tokens > g.max_length:
        raise UserError(
            f"a question has {longest} tokens, which leaves less than {g.max_tokens} of "
            f"generate.max_length={g.max_length} for its answer: raise max_length"
        )
    merged = g.adapters == "merged"
    rank = 0 if merged else experiment.source.lora.rank
    setting = Setting(path, spec.dtype, g.at_once, g.max_length, rank=rank, merged=merged)
    weights = experiment.source.source.model_in(this.site.cache, experiment.load_of(cell)).bytes
    engine = make_engine(word, setting, g.count(weights))
    return AskLine(
        experiment, asked, desk, engine, Sampling(g.temperature, g.max_tokens, ends_of(path, tokenizer.eos_token_id))
    )


class AskLine(Line["Asking"]):
    """Of all students of a size, and its base."""

    def __init__(
        self, experiment: Preferences, asked: "Asked", desk: "Apart", engine: "Engine", how: "Sampling"
    ) -> None:
        super().__init__(experiment.generate.batch)
        self.experiment, self.asked, self.desk, self.engine, self.how = experiment, asked, desk, engine, how
        self.references = References(experiment, min(PROBED, len(asked.contexts)))
        self.read: dict[str, Unchanged] = {}  # by cell

    def turn(self, cell: Cell) -> None:
        """A batch that was begun before it, of a student that was another one then, is begun anew."""
        if not self.read.get(cell.name, True):
            self.begun = {}
        self.read[cell.name] = Unchanged(cell)

    def begin(self, cell: Cell, start: int, stop: int) -> "Asking":
        from lib.models.engine import Batch, Probe, Work, seeds_of

        e, rows = self.experiment, range(start, stop)
        epoch, question, _ = places(e, cell.name, rows)
        own: dict[int, Adapter] = {}
        read = self.read.setdefault(cell.name, Unchanged(cell))
        if e.place(cell.name).student:
            own = adapters_of(cell.parents[0], e.source.schedule(), np.unique(epoch).tolist())
        self.references.read(cell)
        read.check()
        known: list[tuple[Key, Adapter | None]] = [((BASE, 0), None)]
        known += [((cell.name, number), adapter) for number, adapter in own.items()]
        keys = [key for key, _ in known for _ in range(self.references.count)]
        probes = [
            Probe(tuple(self.asked.whole(q)), self.asked.probes[q], adapter)
            for _, adapter in known
            for q in range(self.references.count)
        ]
        of = [own.get(number) for number in epoch.tolist()]
        prompts = [self.asked.whole(q) for q in question.tolist()]
        work = Work(prompts, self.how, seeds_of(e.seed_used, cell.name, rows), of, probes)
        return Batch(rows, sum(map(len, prompts)), self.engine.begin(work)), keys

    def columns(self, cell: Cell, rows: range, answers: list["Answer"]) -> dict[str, Any]:
        """Few answers differ: each is read once."""
        distinct = list(dict.fromkeys(tuple(one.ids) for one in answers))
        texts = dict(zip(distinct, self.desk.ask("read", list(map(list, distinct)), rows=len(distinct))(), strict=True))
        epoch, question, number = places(self.experiment, cell.name, rows)
        return {
            "epoch": epoch.astype(np.int16),
            "question": question.astype(np.int16),
            "number": number.astype(np.int32),
            "answer": [texts[tuple(one.ids)] for one in answers],
            "tokens": np.array([len(one.ids) for one in answers], np.int16),
            "ended": np.array([one.ended for one in answers], np.int8),
        }


def places(e: Preferences, cell: str, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epoch, question and number of each row: all of an adapter after one another, the same question's too."""
    at = np.arange(rows.start, rows.stop)
    epoch = np.array(e.epochs_of(cell))[at // e.epoch_rows]
    return epoch, at % e.epoch_rows // e.per_question, at % e.per_question


class AskKernel(Drawing[AskLine]):
    def compute(self, prepared: "Asking") -> tuple[Callable[[], dict[str, Any]], dict[str, float | str]]:
        batch, keys = prepared
        made = batch.wait()
        facts = batch.facts(self.word, made) | self.line.references.proven(self.cell, keys, made.probes)
        facts |= {"template": self.line.experiment.template_used}
        return lambda: self.line.columns(self.cell, batch.rows, made.answers), facts
