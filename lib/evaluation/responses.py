"""A model's own greedy responses to prompts, and how toxic they are."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from lib.base.errors import UserError
from lib.evaluation.toxicity import Toxicity
from lib.inputs.prompts import Answer
from lib.inputs.specs import ModelSpec, PromptsSpec
from lib.inputs.verified import checked_model
from lib.models.classifier import load_classifier
from lib.models.load import load_model, load_tokenizer, visible_devices
from lib.models.rope import positions
from lib.models.tokens import must_know, vocabulary_of


def answerer(cache: Path, model: ModelSpec, spec: PromptsSpec, name: str, by_hand: str) -> Answer:
    """Loads the model and the scorer; returns what answers a batch of prompts."""
    try:
        devices = visible_devices()
    except UserError as e:
        raise UserError(
            f"samples {name} are chosen by the model's own responses, which takes a GPU; all else is fetched: "
            f"run `{by_hand}` once ({e})"
        ) from None
    scorer = checked_model(cache, spec.scorer.id, spec.scorer.revision).path
    toxicity = Toxicity(load_classifier(scorer, spec.scorer.dtype, devices[0]), load_tokenizer(scorer))
    folder = checked_model(cache, model.id, model.revision).path
    tokenizer = load_tokenizer(folder)
    writer = load_model(folder, model.dtype, "sdpa", devices)

    def answer(prompts: list[list[int]]) -> list[tuple[str, float]]:
        texts = greedy(writer, tokenizer, prompts, spec.response_tokens)
        return list(zip(texts, toxicity(texts).tolist(), strict=True))

    return answer


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[str]:
    """The most likely continuation of each prompt, up to the model's end or `tokens` tokens; the prompt is not in it.

    Every field is set: a model's own generation_config may hold a repetition penalty or sampling."""
    ends = _ends(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=tokens,
        min_length=0,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    longest, most = max(map(len, prompts)), positions(model.config)
    if most and longest + tokens > most:
        raise UserError(
            f"a prompt of {longest} tokens and a response of {tokens} do not fit into the model's {most} positions; "
            "lower max_tokens or response_tokens of these prompts"
        )
    must_know(min(map(min, prompts)), max(map(max, prompts)), vocabulary_of(model))
    ids_BT = torch.full((len(prompts), longest), pad, device=model.device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(prompts):
        ids_BT[row, longest - len(ids) :] = torch.tensor(ids, device=model.device)
        mask_BT[row, longest - len(ids) :] = 1
    made = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=plain)[:, longest:].tolist()
    cut = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in made]
    return [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(made, cut, strict=True)]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those of the model, which may have several."""
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    found = [token for token in (tokenizer.eos_token_id, *named) if token is not None]
    if not found:
        raise UserError("neither the model nor its tokenizer says which token ends a text (eos_token_id)")
    return list(dict.fromkeys(found))
