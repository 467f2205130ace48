"""Models and tokenizers from a fetched folder onto the device; never from a network."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lib.errors import UserError

if not sys.stderr.isatty():
    logging.disable_progress_bar()  # a bar's carriage returns fill a log


def device() -> torch.device:
    """The GPU this task was given. On a GPU site its absence is an error, not a slow run on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if os.environ.get("SUITE_GPU", "cpu") != "cpu":
        raise UserError(
            f"no GPU is visible (site {os.environ.get('SUITE_SITE')}, torch {torch.__version__}): ask for one with "
            "--gpus-per-node=1, check `make doctor`, or set SUITE_GPU=cpu to mean the CPU"
        )
    return torch.device("cpu")


def device_name(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"


def load_tokenizer(folder: str) -> Any:
    _must_exist(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"the tokenizer in {folder} cannot be read ({_line(e)}); run `make fetch` again") from None


def load_model(folder: str, dtype: str, attention: str, where: torch.device) -> Any:
    """An eval-mode causal language model. Weights go from safetensors to the device, layer by layer."""
    _must_exist(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            device_map={"": where},
            local_files_only=True,
        )
    except torch.cuda.OutOfMemoryError as e:
        raise UserError(f"the model does not fit this GPU ({_line(e)}); use one with more memory") from None
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise UserError(f"the model in {folder} cannot be loaded ({_line(e)}); run `make fetch` again") from None
    except Exception as e:  # safetensors_rust.SafetensorError has no public base of its own
        if "safetensor" in type(e).__name__.lower():
            raise UserError(f"a weight file in {folder} is broken ({_line(e)}); run `make fetch` again") from None
        raise
    return model.eval().requires_grad_(False)


def _must_exist(folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no model (config.json is missing); run `make fetch`")


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]
