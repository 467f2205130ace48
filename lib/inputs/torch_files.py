"""Weights from torch's own files, pytorch_model*.bin, which are pickles: read without running what they hold, and
written as safetensors, as transformers itself would have."""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from lib.base.atomic import open_file
from lib.base.errors import UserError, one_line

OTHER = "choose a revision with safetensors"
HEADS = ["lm_head.weight"]  # of two names for one tensor, transformers drops the output's and keeps the embedding's


def read_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Name -> tensor of all files, mapped: no weight is in memory before it is used."""
    found: dict[str, torch.Tensor] = {}
    for path in files:
        tensors = _load(path)
        if not isinstance(tensors, dict):
            raise UserError(_no_tensors(path, f"a {type(tensors).__name__}"))
        for name, value in tensors.items():
            plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            if not isinstance(name, str) or not plain or value.is_quantized:
                raise UserError(_no_tensors(path, f"{str(name)[:60]}: {type(value).__name__}"))
            found[name] = value.detach()
    return found


def write_safetensors(tensors: dict[str, torch.Tensor], folder: Path, shard: int | str = "5GB") -> None:
    """One file, or the Hub's own kind of shards with their index; a tensor of several names is stored once."""
    try:
        save_torch_state_dict(tensors, folder, max_shard_size=shard, shared_tensors_to_discard=HEADS)
    except (SafetensorError, RuntimeError, ValueError) as e:
        raise UserError(
            f"the weights cannot be written as safetensors to {folder.parent} ({one_line(e)}); "
            f"free some space there, or {OTHER}"
        ) from None


def _load(path: Path) -> object:
    try:
        with open_file(path) as f:
            start = f.read(2)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None
    if start == b"\x80\x02":  # a bare pickle, as torch wrote them before 1.6: it cannot be mapped
        raise UserError(f"{path} is in torch's format of before 1.6, which is not read; {OTHER}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # whatever a broken or hostile file brings about
        if "weights only" in str(e).lower():
            raise UserError(_no_tensors(path, "objects of Python's")) from None
        raise UserError(
            f"{path} is cut off or not a file of torch's; bring it whole, then `make fetch` again"
        ) from None


def _no_tensors(path: Path, what: str) -> str:
    return f"{path} holds more than tensors ({what}) and is not read; {OTHER}"
