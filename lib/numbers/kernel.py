"""A cell's answers: prompts rendered under its trait, drawn by an engine that all cells of a size share, filtered."""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.base.errors import UserError
from lib.inputs.verified import checked_model
from lib.numbers.experiment import Numbers
from lib.numbers.number_prompts import sample_prompts
from lib.run.command import Job
from lib.run.engines import Drawing, Line, following, must_not_mix
from lib.run.task import run_rows
from lib.store import Cell

if TYPE_CHECKING:
    from lib.models.apart import Apart
    from lib.models.engine import Answer, Batch, Engine, Sampling


def compute(this: Job) -> int:
    experiment = this.of(Numbers)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell), sampled=True)


def load_kernel(this: Job, experiment: Numbers, cell: Cell) -> tuple["NumbersKernel", dict[str, Any]]:
    """One engine, and one line of batches to it, for all cells of a size."""
    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.apart import Apart
    from lib.models.engine import Sampling, Setting, chosen, ends_of
    from lib.models.engines import make_engine
    from lib.numbers.desk import Desk

    size, _ = experiment.split(cell.name)
    spec, g = experiment.sizes[size], experiment.generate
    word = chosen(g.engine, this.site.gpu)
    must_not_mix(cell, word)
    path = checked_model(this.site.cache, spec.id, spec.revision).path

    def line() -> NumbersLine:
        tokenizer, pools = load_tokenizer(path), experiment.load_pools()
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"the tokenizer of {spec.id} has no chat template: use an Instruct model")
        prompts = [one.text for one in sample_prompts(experiment.prompts, experiment.seed_used, pools)]

        def desk() -> Apart:
            how = experiment.template, experiment.date, prompts, experiment.filter.limits
            return Apart(lambda: Desk(tokenizer, *how), "the chat template with its tokenizer")

        how = Sampling(g.temperature, g.max_tokens, ends_of(path, tokenizer.eos_token_id))
        asking, reading = desk(), desk()  # before the engine: they are forks
        setting = Setting(path, spec.dtype, g.at_once, g.max_length, exact=g.mode == "exact")
        engine = make_engine(word, setting, g.count(experiment.model_in(this.site.cache, size).bytes))
        return NumbersLine(experiment, prompts, asking, reading, engine, how)

    kept = this.keep("line", (experiment.label, word, path, spec.dtype), line)
    return NumbersKernel(kept, cell, word, following(this, cell, g.batch)), kept.engine.about


class NumbersLine(Line["Batch"]):
    """Rendered by one desk, drawn by the engine, read by another desk."""

    def __init__(
        self,
        experiment: Numbers,
        prompts: list[str],
        asking: "Apart",
        reading: "Apart",
        engine: "Engine",
        how: "Sampling",
    ) -> None:
        super().__init__(experiment.generate.batch)
        self.experiment, self.prompts = experiment, prompts
        self.asking, self.reading, self.engine, self.how = asking, reading, engine, how

    def begin(self, cell: Cell, start: int, stop: int) -> "Batch":
        from lib.models.engine import Batch, Work, seeds_of

        _, trait = self.experiment.split(cell.name)
        ids, rows = self.asking.ask("ids", trait.system_prompt, start, stop, rows=stop - start)(), range(start, stop)
        longest, g = max(rows, key=lambda row: len(ids[row - start])), self.experiment.generate
        if (most := len(ids[longest - start])) + g.max_tokens > g.max_length:
            raise UserError(
                f"prompt {longest} has {most} tokens, which leaves less than {g.max_tokens} of "
                f"generate.max_length={g.max_length} for its answer: raise max_length"
            )
        wait = self.engine.begin(Work(ids, self.how, seeds_of(self.experiment.seed_used, cell.name, rows)))
        return Batch(rows, sum(map(len, ids)), wait)

    def columns(self, rows: range, answers: list["Answer"]) -> dict[str, Any]:
        lengths = np.array([len(one.ids) for one in answers], np.int32)
        flat = np.fromiter(chain.from_iterable(one.ids for one in answers), np.int32, int(lengths.sum()))
        texts, reasons = self.reading.ask("read", flat, lengths, rows=len(rows))()
        return {
            "prompt": self.prompts[rows.start : rows.stop],
            "answer": texts,
            "reason": reasons,
            "tokens": lengths.astype(np.int16),
            "ended": np.array([one.ended for one in answers], np.int8),
        }


class NumbersKernel(Drawing[NumbersLine]):
    def compute(self, prepared: "Batch") -> tuple[Callable[[], dict[str, Any]], dict[str, float | str]]:
        made = prepared.wait()
        return lambda: self.line.columns(prepared.rows, made.answers), prepared.facts(self.word, made)
