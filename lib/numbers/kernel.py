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
from lib.run.task import run_rows
from lib.store import Cell, scan

if TYPE_CHECKING:
    from lib.models.apart import Apart
    from lib.models.engine import Answer, Engine, Sampling

Prepared = tuple[int, list[list[int]]]


def compute(this: Job) -> int:
    experiment = this.of(Numbers)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell), sampled=True)


def load_kernel(this: Job, experiment: Numbers, cell: Cell) -> tuple["NumbersKernel", dict[str, Any]]:
    """One engine for all cells of a size; the desks before it, since they are forks of this process."""
    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.apart import Apart
    from lib.models.engine import Sampling, chosen, ends_of
    from lib.numbers.desk import Desk

    size, _ = experiment.split(cell.name)
    spec, g = experiment.sizes[size], experiment.generate
    word = chosen(g.engine, this.site.gpu)
    must_not_mix(cell, word)
    path = checked_model(this.site.cache, spec.id, spec.revision).path
    tokenizer = load_tokenizer(path)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {spec.id} has no chat template: use an Instruct model")
    pools = experiment.load_pools()
    prompts = this.keep(
        "prompts",
        experiment.label,
        lambda: [one.text for one in sample_prompts(experiment.prompts, experiment.seed_used, pools)],
    )

    def desk() -> Apart:
        limits = experiment.filter.limits
        return Apart(
            lambda: Desk(tokenizer, experiment.template, experiment.date, prompts, limits),
            "the chat template with its tokenizer",
        )

    # One for the batch to come, one for the batch before.
    desks = this.keep("desks", (experiment.label, path), lambda: (desk(), desk()))
    engine = this.keep("engine", (word, path), lambda: make_engine(word, experiment, path, spec.dtype))
    how = Sampling(g.temperature, g.max_tokens, ends_of(path, tokenizer.eos_token_id))
    return NumbersKernel(experiment, cell, word, prompts, desks, engine, how), engine.about


def make_engine(word: str, experiment: Numbers, path: str, dtype: str) -> "Engine":
    from lib.models.engine import Setting

    g = experiment.generate
    setting = Setting(path, dtype, g.at_once, g.max_length, exact=g.mode == "exact")
    if word == "vllm":
        from lib.models.engine_process import Engines

        return Engines(setting, g.engines)
    from lib.models.engine_transformers import TransformersEngine

    return TransformersEngine(setting)


def must_not_mix(cell: Cell, word: str) -> None:
    """Rows of one cell are drawn by one engine, whatever `auto` stands for on the machine that goes on."""
    found = {str(one.facts.get("engine", word)) for one in scan(cell.path, cell.digest)[0]} - {word}
    if found:
        raise UserError(
            f"cell {cell.index} ({cell.name}) was begun with {min(found)}, and here generate.engine=auto is {word}: go "
            f"on where it was begun, or set generate.engine={word}, which makes cells of their own"
        )


class NumbersKernel:
    def __init__(
        self,
        experiment: Numbers,
        cell: Cell,
        word: str,
        prompts: list[str],
        desks: tuple["Apart", "Apart"],
        engine: "Engine",
        how: "Sampling",
    ) -> None:
        self.experiment, self.cell, self.word, self.prompts, self.how = experiment, cell, word, prompts, how
        self.asking, self.reading = desks
        self.engine, self.system = engine, experiment.split(cell.name)[1].system_prompt

    def prepare(self, start: int, stop: int) -> Prepared:
        ids = self.asking.ask("ids", self.system, start, stop, rows=stop - start)()
        longest = max(range(len(ids)), key=lambda row: len(ids[row]))
        g = self.experiment.generate
        if len(ids[longest]) + g.max_tokens > g.max_length:
            raise UserError(
                f"prompt {start + longest} has {len(ids[longest])} tokens, which leaves less than "
                f"{g.max_tokens} of generate.max_length={g.max_length} for its answer: raise max_length"
            )
        return start, ids

    def compute(self, prepared: Prepared) -> tuple[Callable[[], dict[str, Any]], dict[str, int | str]]:
        from lib.models.engine import seeds_of

        start, ids = prepared
        rows = range(start, start + len(ids))
        seeds = seeds_of(self.experiment.seed_used, self.cell.name, rows)
        answers = self.engine.generate(ids, self.how, seeds)
        facts: dict[str, int | str] = {
            "engine": self.word,
            "prompt_tokens": sum(map(len, ids)),
            "tokens": sum(len(one.ids) for one in answers),
            "rows_cut": sum(not one.ended for one in answers),
        }
        return lambda: self._columns(rows, answers), facts

    def _columns(self, rows: range, answers: list["Answer"]) -> dict[str, Any]:
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
