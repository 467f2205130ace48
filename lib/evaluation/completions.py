"""Several seeded completions a prompt, comparable between a model and the same one pruned.

The noise of a draw is a hash of (seed, prompt, number, step, token) (lib.models.gumbel), so both models get the same;
and all batches have one shape, [batch, longest prompt], filled up with repetitions: a completion depends on its prompt,
the seed and that shape, not on its neighbours, nor on which part of the prompts is answered at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lib.models.gumbel import Gumbel
from lib.models.sample import Generates, continuations, text_of


@dataclass(frozen=True)
class Completing:
    per_prompt: int = 25  # completions
    tokens: int = 50  # of a completion, at most
    temperature: float | None = 1.0  # None: the likeliest, without noise
    seed: int = 0
    batch: int = 256  # completions at once


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # without the prompt and without the end
    text: str  # of these, or, if asked for, of prompt and completion


def complete(
    model: Generates,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    how: Completing,
    chosen: range | None = None,
    with_prompt: bool = False,
) -> list[list[Completion]]:
    """For each of the chosen prompts its completions. `prompts` are always all of a set, padding and noise go by them;
    `chosen`: those that are answered now (by default all)."""
    width = max(map(len, prompts))
    rows = min(how.batch, len(prompts) * how.per_prompt)
    chosen = range(len(prompts)) if chosen is None else chosen
    numbers = [(prompt, number) for prompt in chosen for number in range(how.per_prompt)]
    found: list[Completion] = []
    for start in range(0, len(numbers), rows):
        batch = numbers[start : start + rows]
        full = batch + batch[-1:] * (rows - len(batch))
        noise = None
        if how.temperature is not None:
            noise = Gumbel(how.seed, full, width, how.tokens, how.temperature, model.device)
        made = continuations(model, tokenizer, [prompts[prompt] for prompt, _ in full], how.tokens, width, noise)
        for (prompt, _), ids in zip(batch, made, strict=False):  # what only filled the batch is left
            found.append(Completion(ids, text_of(tokenizer, [*prompts[prompt], *ids] if with_prompt else ids)))
    return [found[i * how.per_prompt : (i + 1) * how.per_prompt] for i in range(len(chosen))]
