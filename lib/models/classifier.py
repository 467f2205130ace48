"""A text classifier from a fetched folder; never from a network, never from a pickle."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lib.models.load import load_config, load_whole


def load_classifier(folder: str, dtype: str, where: torch.device) -> Any:
    """transformers' own model, in eval mode. A head that is not in the file would be random: that is an error."""
    load_config(folder)
    kind = AutoModelForSequenceClassification
    return load_whole(kind, "the classifier", folder, dtype=getattr(torch, dtype), device_map={"": where})
