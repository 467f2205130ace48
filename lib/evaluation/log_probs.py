"""Log-probabilities of the scored tokens of windows, one array a window: by the suite's decoder, or by a model of
transformers.

All batches of a call have one shape, and the head works in blocks of one size: what a window scores depends on its own
tokens alone. No more logits exist at once than a block's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lib.base.errors import UserError
from lib.evaluation.perplexity import Window
from lib.models.decoder import to_device
from lib.models.packing import Item
from lib.models.plain_ops import log_prob
from lib.models.rope import positions
from lib.models.scorer import Scorer
from lib.models.tokens import must_know, vocabulary_of


def by_decoder(scorer: Scorer, windows: Sequence[Window]) -> list[np.ndarray]:
    """Packed end to end, batch after batch without waiting for the device: the fastest way (Llama, Qwen)."""
    _must_fit(windows, scorer.decoder.positions)
    if (most := max(w.inputs for w in windows)) > scorer.batch_tokens:
        raise UserError(
            f"a window of {most} tokens does not fit into batches of {scorer.batch_tokens}; raise batch_tokens"
        )
    items = [Item(tuple(w.ids[: w.first].tolist()), tuple(w.ids[w.first :].tolist())) for w in windows]
    return scorer(scorer.decoder.prefix([]), items)


@torch.inference_mode()
def by_model(model: Any, windows: Sequence[Window], rows: int = 4, block: int = 1024) -> list[np.ndarray]:
    """The body over `rows` windows at once, padded behind their ends, which causal attention never looks at; then the
    head over `block` positions at once."""
    _must_fit(windows, positions(model.config))
    must_know(min(int(w.ids.min()) for w in windows), max(int(w.ids.max()) for w in windows), vocabulary_of(model))
    width, first = max(w.inputs for w in windows), model.get_input_embeddings().weight.device
    scored = []
    for start in range(0, len(windows), rows):
        ids, where, targets = _batch(windows[start : start + rows], rows, width)
        hidden_BTD = model.base_model(input_ids=to_device(ids, first), use_cache=False).last_hidden_state
        picked_PD = hidden_BTD.flatten(0, 1)[to_device(where, hidden_BTD.device)]
        scored.append(_log_probs(picked_PD, to_device(targets, picked_PD.device), model.get_output_embeddings(), block))
    flat = torch.cat(scored).cpu().numpy()
    return np.split(flat, np.cumsum([len(w.ids) - w.first for w in windows])[:-1])


def _batch(windows: Sequence[Window], rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [rows, width]; places in it that predict, and what they predict."""
    ids = np.zeros((rows, width), np.int64)
    for row, window in enumerate(windows):
        ids[row, : window.inputs] = window.ids[:-1]
    where = [row * width + np.arange(w.first - 1, w.inputs) for row, w in enumerate(windows)]
    return ids, np.concatenate(where), np.concatenate([w.ids[w.first :] for w in windows]).astype(np.int64)


def _log_probs(hidden_PD: torch.Tensor, target_P: torch.Tensor, head: Any, block: int) -> torch.Tensor:
    count, pad = len(target_P), -len(target_P) % block
    hidden_PD = torch.cat([hidden_PD, hidden_PD.new_zeros(pad, hidden_PD.shape[1])])
    target_P = torch.cat([target_P, target_P.new_zeros(pad)])
    parts = zip(hidden_PD.split(block), target_P.split(block), strict=True)
    return torch.cat([log_prob(head(states), targets) for states, targets in parts])[:count]


def _must_fit(windows: Sequence[Window], most: int | None) -> None:
    longest = max(w.inputs for w in windows)
    if most and longest > most:
        raise UserError(f"a window of {longest} tokens is longer than the model's {most} positions; lower the window")
