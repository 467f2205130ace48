"""Perplexity by three conventions, exactly as those who named them compute it. A number without its convention says
nothing: Llama-2-7B on WikiText-2 has 5.47 by `window`, 5.12 by windows of 4,096, 8.79 by `word`.

window  Wanda's and SparseGPT's `eval_ppl`: the whole text, its lines joined by an empty one, tokenised once and cut
        into windows of 2,048 that share nothing (no BOS but the text's own); the last, partial one is left out. exp of
        the mean over windows of each one's mean loss, which is over 2,047 predictions. LLaMA-3-8B, dense: 6.13.
stride  The seeds' `evaluate_perplexity`, after transformers' guide on perplexity: windows of 2,048 that advance by a
        quarter (512), each scoring its new tokens alone. Three oddities are kept, since the number is the convention:
        window i ends at (i + 1) * 512, so the first ones are shorter than 2,048; the very first scores 511 tokens, and
        its mean counts as one over 512; so the sum is divided by all tokens, the never predicted first among them.
word    lm-evaluation-harness, task `wikitext`, word_perplexity, with add_bos_token=False (else it puts a BOS before the
        BOS of a tokenizer that adds one): each page by itself, detokenised; every token is predicted once, the first
        from BOS (EOS where there is none), in windows of 2,048 that begin with the one token before them, the last
        one of a page reaching back as far as a window goes. exp of minus the log-likelihood a word of the raw page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from lib.base.errors import UserError

Convention = Literal["window", "stride", "word"]
WINDOW = 2048  # tokens, by all three


@dataclass(frozen=True, eq=False)
class Window:
    ids: np.ndarray  # int32
    first: int  # from this token on all are scored, each by those before it
    weight: int  # so many tokens does the mean of the scored ones stand for

    @property
    def inputs(self) -> int:
        """Tokens that are read: from the last one nothing is predicted."""
        return len(self.ids) - 1


def label(convention: Convention, window: int = WINDOW) -> str:
    """window2048, stride512, word; another window is part of the name."""
    names = {"window": f"window{window}", "stride": f"stride{_step(window)}", "word": "word"}
    return names[convention] + ("" if window == WINDOW or convention == "window" else f"-of-{window}")


def plan(
    convention: Convention, rows: Sequence[np.ndarray], window: int = WINDOW, prefix: int | None = None
) -> list[Window]:
    """What is to be scored. `rows`: token ids, of the whole text in one row, or (word) of each page; `prefix`: the
    token that a page's first is predicted from."""
    if window < 4:
        raise UserError(f"a window of {window} tokens is too short to measure perplexity in; take 4 or more")
    if convention == "word":
        if prefix is None:
            raise ValueError("pages are predicted from a prefix token")
        found = [w for ids in rows for w in _page(np.asarray(ids, np.int32), window, prefix)]
        if not found:
            raise UserError("the pages hold not one token; check the split and the config of their dataset")
        return found
    (ids,) = rows
    if len(ids) < window:
        raise UserError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}: take a longer text or a shorter window"
        )
    return (_apart if convention == "window" else _striding)(np.asarray(ids, np.int32), window)


def perplexity(windows: Sequence[Window], log_probs: Sequence[np.ndarray], words: int | None = None) -> float:
    """exp of the mean loss a token, or, of all pages' windows, a word. float64; inf where it is beyond all numbers."""
    means = np.array([-values.mean(dtype=np.float64) for values in log_probs])
    if np.isnan(means).any():
        raise UserError(
            "a log-probability is not a number: the weights hold NaN, or overflow in this precision; fetch them again, "
            "or try model.dtype=float32"
        )
    weights = np.array([w.weight for w in windows], np.float64)
    with np.errstate(over="ignore"):
        return float(np.exp((means * weights).sum() / (weights.sum() if words is None else words)))


class Tokenizer(Protocol):
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...


def prefix_token(tokenizer: Tokenizer) -> int:
    """What lm-evaluation-harness begins a page with."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither BOS nor EOS, so no token that a page's first can be predicted from")


def _step(window: int) -> int:
    return window // 4


def _apart(ids: np.ndarray, window: int) -> list[Window]:
    whole = len(ids) // window
    return [Window(ids[i * window : (i + 1) * window], 1, window) for i in range(whole)]


def _striding(ids: np.ndarray, window: int) -> list[Window]:
    step, found = _step(window), []
    for begin in range(0, len(ids), step):
        start, end = max(begin + step - window, 0), min(begin + step, len(ids))
        found.append(Window(ids[start:end], max(begin - start, 1), end - begin))
    return found


def _page(ids: np.ndarray, window: int, prefix: int) -> list[Window]:
    """Each token is scored once; all windows but a page's first have `window` tokens to read."""
    whole, found = np.concatenate([[np.int32(prefix)], ids]), []
    for done in range(0, len(ids), window):
        end = min(done + window, len(ids))
        start = 0 if done == 0 else end - window
        found.append(Window(whole[start : end + 1], done + 1 - start, end - done))
    return found
