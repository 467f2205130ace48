"""Rung of scoring: transformers' own model, given what batches can give it: rows laid end to end without padding,
attention that heeds their borders, logits only where something is predicted. What a decoder of our own is worth."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from lib.bench.shapes import HEAD_ROWS, NAIVE_ROWS, PREFIX, ROWS, SHAPES, Result, qwen_config, rows
from lib.models.packing import Item

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Model

CHECKED = 16  # rows that are computed one by one, too


def packed(model: str, batch_tokens: int) -> Result:
    """Rows a second, each with its prefix: transformers shares none; and how far its values are from plain rows'."""
    from transformers import AttentionInterface, Qwen2ForCausalLM

    if model not in NAIVE_ROWS:
        return {"skipped": "not measured for this size"}
    AttentionInterface.register("packed", over_borders)
    config, items = qwen_config(SHAPES[model]), sorted(rows(SHAPES[model], ROWS[model]), key=lambda i: len(whole(i)))
    with torch.device("cuda"):
        hf = Qwen2ForCausalLM._from_config(config, attn_implementation="packed", dtype=torch.bfloat16).eval()
    batches = list(filled(items, batch_tokens))
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            found = [scores(hf, batch).cpu() for batch in batches]
            seconds.append(time.perf_counter() - start)
        few = len([token for item in items[:CHECKED] for token in item.response])
        hf.set_attn_implementation("sdpa")
        worst = (plain(hf, items[:CHECKED]).cpu() - torch.cat(found)[:few]).abs().max()
    return {"rows_per_s": round(len(items) / min(seconds), 1), "worst_against_plain": round(float(worst), 4)}


def whole(item: Item) -> list[int]:
    return [*range(PREFIX), *item.context, *item.response]


def filled(items: Sequence[Item], batch_tokens: int) -> Iterator[list[Item]]:
    batch, tokens = list[Item](), 0
    for item in items:
        if batch and tokens + len(whole(item)) > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += len(whole(item))
    yield batch


def scores(hf: "Qwen2ForCausalLM", batch: Sequence[Item]) -> torch.Tensor:
    """Log-probabilities of all responses, one after another."""
    lengths = [len(whole(item)) for item in batch]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    body: Qwen2Model = hf.model
    hidden = body(
        input_ids=torch.tensor([[token for item in batch for token in whole(item)]], device=hf.device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(hf.device),
        use_cache=False,
        borders=ends.int().to(hf.device),
        longest=max(lengths),
    ).last_hidden_state[0]
    spans = [(int(end), len(item.response)) for end, item in zip(ends[1:], batch, strict=True)]
    before = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in spans]).to(hf.device)
    wanted = torch.tensor([token for item in batch for token in item.response], device=hf.device)
    parts = zip(before.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True)
    return torch.cat([_chosen(hf.lm_head(hidden[some]), tokens) for some, tokens in parts])


def plain(hf: "Qwen2ForCausalLM", batch: Sequence[Item]) -> torch.Tensor:
    """The same, row by row."""
    found = []
    for item in batch:
        logits = hf(input_ids=torch.tensor([whole(item)], device=hf.device), use_cache=False).logits[0]
        tokens = torch.tensor(item.response, device=hf.device)
        found.append(_chosen(logits[-len(tokens) - 1 : -1], tokens))
    return torch.cat(found)


def _chosen(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def over_borders(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    borders: torch.Tensor,
    longest: int,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it, [1, heads, tokens, width]; torch's flash attention for rows of many lengths."""
    if query.device.type == "cuda":
        given = (x[0].transpose(0, 1) for x in (query, key, value))
        flash = torch.ops.aten._flash_attention_forward
        return flash(*given, borders, borders, longest, longest, 0.0, True, False, scale=scaling)[0][None], None
    spans = borders.diff().tolist()
    each = zip(*(x.split(spans, 2) for x in (query, key, value)), strict=True)
    rows = [attention(*row, is_causal=True, scale=scaling, enable_gqa=True) for row in each]
    return torch.cat(rows, 2).transpose(1, 2), None


RUNGS: dict[str, Callable[[str, int], Result]] = {"packed": packed}
