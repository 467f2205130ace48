"""Token ids against the model that is to read them."""

from typing import Any

from lib.base.errors import UserError


def must_know(least: int, most: int, vocabulary: int) -> None:
    """Ids outside an embedding would be an IndexError on a CPU, and on a GPU the end of the process."""
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise UserError(
            f"token {wrong} is none of the model's {vocabulary}: the tokenizer has more than the embedding, or is "
            "another model's; use the tokenizer and the config.json that belong to these weights"
        )


def vocabulary_of(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
