"""A model's own greedy responses to prompts, and how toxic they are."""

from pathlib import Path

from lib.base.errors import UserError
from lib.inputs.prompts import Answer
from lib.inputs.specs import ModelSpec, PromptsSpec
from lib.inputs.verified import checked_model


def answerer(cache: Path, model: ModelSpec, spec: PromptsSpec, name: str, by_hand: str) -> Answer:
    """Loads the model and the scorer; returns what answers a batch of prompts."""
    from lib.evaluation.toxicity import Toxicity  # torch and transformers: only when there is something to answer
    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.classifier import load_classifier
    from lib.models.load import load_model, visible_devices
    from lib.models.sample import greedy

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
