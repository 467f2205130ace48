"""Texts that every pruned model is asked about, cut into windows once, and what it says of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.evaluation.perplexity import Window, perplexity, plan, prefix_token
from lib.inputs.samples import SamplesInput, read_samples
from lib.inputs.tokenizer import load_tokenizer
from lib.pruning.looks import TextsSpec
from lib.store import Column

LogProbs = Callable[[Sequence[Window]], list[np.ndarray]]
SetOf = Callable[[str], SamplesInput]


class Texts:
    """The windows of all conventions, made once."""

    def __init__(self, spec: TextsSpec, cache: Path, set_of: SetOf, model: str) -> None:
        self.windows: dict[str, list[Window]] = {}
        self.words: dict[str, int | None] = {}
        for convention, name in zip(spec.perplexity, spec.labels, strict=True):
            if convention == "word":
                pages = read_samples(cache, set_of("documents"))
                self.windows[name] = plan("word", pages.every, spec.window, prefix_token(load_tokenizer(model)))
                self.words[name] = int(np.asarray(pages.columns["words"]).sum())
            else:
                text = read_samples(cache, set_of("text"))
                self.windows[name], self.words[name] = plan(convention, text.every, spec.window), None

    def look(self, log_probs: LogProbs) -> dict[str, Any]:
        """A row's columns."""
        found: dict[str, Any] = {}
        for name, windows in self.windows.items():
            values = log_probs(windows)
            found[f"perplexity/{name}"] = perplexity(windows, values, self.words[name])
            found[f"windows/{name}"] = len(windows)
            found[f"nll/{name}"] = np.array([-v.sum(dtype=np.float64) for v in values])
            found[f"predictions/{name}"] = np.array([len(v) for v in values], np.int32)
        return found


def stacked(schema: Mapping[str, Column], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as columns."""
    columns: dict[str, Any] = {}
    for name, column in schema.items():
        values = [row[name] for row in rows]
        columns[name] = np.concatenate(values) if column.per else values if column.text else np.stack(values)
    return columns
