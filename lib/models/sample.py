"""Answers drawn from a model with transformers' own generate: plain sampling, no hidden defaults."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch: int = 128,
) -> list[str | None]:
    """One answer a rendered prompt, without its end of turn; None where the end did not come in time.

    Every sampling field is set: a model's own generation_config may hold top_p, top_k or a repetition penalty.
    Answers depend on the seed, the batch size and the order of the prompts."""
    plain = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
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
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)], skip_special_tokens=False)
