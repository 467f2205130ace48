"""A text classifier from a fetched folder; never from a network, never from a pickle."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lib.errors import UserError, one_line
from lib.models.load import must_exist


def load_classifier(folder: str, dtype: str, where: torch.device) -> Any:
    """transformers' own model, in eval mode. A head that is not in the file would be random: that is an error."""
    must_exist(folder)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map={"": where},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise UserError(
            f"the classifier in {folder} cannot be loaded ({one_line(e)}); run `make fetch` again"
        ) from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))[:120]
        raise UserError(f"{folder} is not a classifier: its file lacks {missing}; choose another scorer")
    return model.eval().requires_grad_(False)
