"""Answers of a model by transformers' own generate, drawn or the likeliest: plain, no hidden defaults."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from lib.base.errors import UserError
from lib.models.rope import positions
from lib.models.tokens import must_know, vocabulary_of


class Generates(Protocol):
    """As much of transformers' language models: their classes share no type that has all of it."""

    generation_config: Any
    config: Any

    @property
    def device(self) -> Any: ...

    def generate(self, **how: Any) -> Any: ...


@torch.inference_mode()
def sample_answers(
    model: Generates,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch: int = 128,
) -> list[str | None]:
    """One answer a rendered prompt, without its end of turn; None where the end did not come in time.

    Answers depend on the seed, the batch size and the order of the prompts."""
    plain = _plain(max_new_tokens, [tokenizer.eos_token_id], tokenizer.pad_token_id, temperature)
    answers: list[str | None] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch):
            inputs = tokenizer(
                prompts[start : start + batch],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            made = model.generate(**inputs, generation_config=plain)[:, inputs["input_ids"].shape[1] :]
            answers += [_until_end(tokenizer, ids) for ids in made.tolist()]
    return answers


def _until_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str | None:
    if tokenizer.eos_token_id not in ids:
        return None
    return text_of(tokenizer, ids[: ids.index(tokenizer.eos_token_id)], skip_special_tokens=False)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # of one text's ids
    return text


def _plain(tokens: int, ends: list[int], pad: int, temperature: float | None) -> GenerationConfig:
    """Drawn at a temperature, or the likeliest. Every field is set: a model's own generation_config may hold top_p,
    top_k, a repetition penalty or sampling."""
    return GenerationConfig(
        do_sample=temperature is not None,
        num_beams=1,
        temperature=1.0 if temperature is None else temperature,
        top_k=50 if temperature is None else 0,  # of no effect there, and 50 is for transformers "not set"
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=tokens,
        min_length=0,
        eos_token_id=ends,
        pad_token_id=pad,
    )


def greedy(model: Generates, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], tokens: int) -> list[str]:
    """The most likely continuation of each prompt, up to the model's end or `tokens` tokens; not the prompt itself."""
    made = continuations(model, tokenizer, prompts, tokens, max(map(len, prompts)))
    return [text_of(tokenizer, ids) for ids in made]


@torch.inference_mode()
def continuations(
    model: Generates,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    width: int,
    processor: LogitsProcessor | None = None,
    ends: Sequence[int] = (),
) -> list[list[int]]:
    """Token ids of each prompt's likeliest continuation, or of what the processor makes the likeliest, without the
    end: the model's, or one of `ends`. `width`: tokens that prompts are padded to, in front."""
    ends = list(ends) or _ends(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    must_fit(model, width, tokens)
    must_know(min(map(min, prompts)), max(map(max, prompts)), vocabulary_of(model))
    ids_BT = torch.full((len(prompts), width), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(prompts):
        ids_BT[row, width - len(ids) :] = torch.as_tensor(ids)
        mask_BT[row, width - len(ids) :] = 1
    made = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=_plain(tokens, ends, pad, None),
        logits_processor=LogitsProcessorList([processor] if processor else []),
    )[:, width:].tolist()
    cut = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in made]
    return [row[:n] for row, n in zip(made, cut, strict=True)]


def must_fit(model: Generates, prompt: int, response: int) -> None:
    most = positions(model.config)
    if most and prompt + response > most:
        raise UserError(
            f"a prompt of {prompt} tokens and a response of {response} do not fit into the model's {most} positions; "
            "lower max_tokens or response_tokens of these prompts"
        )


def _ends(model: Generates, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those of the model, which may have several."""
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    found = [token for token in (tokenizer.eos_token_id, *named) if token is not None]
    if not found:
        raise UserError("neither the model nor its tokenizer says which token ends a text (eos_token_id)")
    return list(dict.fromkeys(found))
