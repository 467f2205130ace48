"""Models and tokenizers from a fetched folder onto the devices; never from a network."""

import atexit
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from lib.base.errors import UserError, reading, some
from lib.checkpoint.families import Shape, family_of
from lib.checkpoint.headers import folder_tensors
from lib.inputs.tokenizer import must_exist
from lib.models.decoder import PIECE_VALUES, Decoder, Workspace
from lib.models.rope import rope_table
from lib.models.spread import join, layer_map
from lib.models.weights import load_weights, model_tensors

if not sys.stderr.isatty():
    logging.disable_progress_bar()  # a bar's carriage returns fill a log

GIB = 2**30
ROPE_TOKENS = 1 << 15  # of the scorer's table, at least


def visible_devices() -> list[torch.device]:
    """The GPUs this task was given. On a GPU site their absence is an error, not a slow run on the CPU."""
    if torch.cuda.is_available():
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if os.environ.get("SUITE_GPU", "cpu") != "cpu":
        raise UserError(
            f"no GPU is visible (site {os.environ.get('SUITE_SITE')}, torch {torch.__version__}): ask for one with "
            "--gpus-per-node=1, check `make doctor`, or set SUITE_GPU=cpu to mean the CPU"
        )
    return [torch.device("cpu")]


def device_name(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"


def load_config(folder: str) -> Any:
    """config.json, of a model that its weights and transformers' own code alone make up."""
    must_exist(folder)
    with reading(f"{folder}/config.json cannot be read", "run `make fetch` again"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for key, what in (
        ("quantization_config", "quantised weights"),
        ("transformers_weights", "weights of its own choice"),
    ):
        if getattr(config, key, None):
            raise UserError(f"{folder}/config.json asks for {what} ({key}), not computed here; take the plain model")
    return config


def load_model(folder: str, dtype: str, attention: str, devices: list[torch.device]) -> Any:
    """transformers' own model, in eval mode, its layers over the devices in order."""
    config = load_config(folder)
    model_tensors(Path(folder), bool(config.tie_word_embeddings))
    places = layer_map(config, devices) if len(devices) > 1 else {"": devices[0]}
    how = {"dtype": getattr(torch, dtype), "attn_implementation": attention, "device_map": places}
    model = load_whole(AutoModelForCausalLM, "the model", folder, **how)
    if len(devices) > 1:
        join(model)
    return model


def load_whole(kind: Any, what: str, folder: str, **how: Any) -> Any:
    """from_pretrained, in eval mode, with every tensor from the folder. transformers itself makes up what is missing or
    of another shape, and goes on; what it knows to be made elsewhere (a tied head, old buffers) it does not count."""
    names, said = folder_tensors(Path(folder)).keys(), logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what follows is a page
    try:
        with reading(f"{what} in {folder} cannot be loaded", "run `make fetch` again"):
            model, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # else it stops, without a name that one could read
                output_loading_info=True,
                **how,
            )
    finally:
        logging.set_verbosity(said)
    shapes = [f"{name} of shape {tuple(has)}, not {tuple(wants)}" for name, has, wants in info["mismatched_keys"]]
    prefix = f"{model.base_model_prefix}."
    twice = [name for name in names if prefix + name in names]  # both would be the same parameter
    for says, found in (
        ("lacks", info["missing_keys"]),
        ("has", shapes),
        ("holds, and the model does not use,", info["unexpected_keys"]),
        ("holds under two names", twice),
    ):
        if found:
            raise UserError(
                f"{what} in {folder}: its file {says} {some(found)}; config.json and weights are not of one model, "
                "or cut: choose another, or run `make fetch` again"
            )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class DecoderMemory:
    """What a decoder will hold on its fullest device, before anything is loaded."""

    weights: int
    activations: int
    embed_on_host: bool
    total: int  # of the device, without what others hold

    @property
    def need(self) -> int:
        return self.weights + self.activations

    def __str__(self) -> str:
        where = "embedding in host memory" if self.embed_on_host else "embedding on the GPU"
        parts = f"weights {self.weights / GIB:.2f} + activations {self.activations / GIB:.2f} GiB"
        return f"memory a GPU: {self.need / GIB:.2f} of {self.total / GIB:.1f} GiB ({parts}, {where})"


def plan_decoder(
    shape: Shape, itemsize: int, batch_tokens: int, head_rows: int, devices: int, total: int, check_tokens: int = 0
) -> DecoderMemory:
    """Weights by the shapes; activations: the workspaces, and what is alive beside them at the worst moment: keys and
    values of a batch with a block of logits, or, where rows are checked in higher precision, converted weights."""
    layers = -(-shape.layers // devices)
    per_layer = shape.layer_parameters + 2 * shape.hidden + (shape.qkv if shape.bias else 0)
    per_layer += 2 * shape.head if shape.head_norms else 0
    table = shape.vocabulary * shape.hidden * itemsize
    weights = layers * per_layer * itemsize + (0 if shape.tied and devices == 1 else table)
    kv = batch_tokens * 2 * shape.kv_heads * shape.head * itemsize
    picked = batch_tokens * shape.hidden * itemsize  # three copies of the third that predicts
    passing = kv + head_rows * shape.vocabulary * itemsize + picked
    activations = Workspace.bytes(shape, batch_tokens, itemsize)
    if check_tokens:
        wide = 2 * itemsize  # bfloat16 is checked in float32, float32 in float64
        activations += Workspace.bytes(shape, check_tokens, wide)
        product = check_tokens * min(PIECE_VALUES // shape.hidden, 2 * shape.inner)
        passing = max(passing, wide * (PIECE_VALUES + product))
    activations += passing
    on_host = not (shape.tied and devices == 1) and weights + table + activations > 0.96 * total
    second = 0 if on_host or devices > 1 else table  # on several, embedding and head lie on the first and the last
    return DecoderMemory(weights + second, activations, on_host, total)


def free_memory(devices: list[torch.device]) -> int:
    """Of the fullest device, in bytes."""
    return min(torch.cuda.mem_get_info(d)[0] for d in devices)


class Plan(Protocol):
    @property
    def need(self) -> int: ...


def announce(what: str, memory: Plan, free: int) -> None:
    """Say what will be held before it is, and at the end what was; a UserError where it does not fit."""
    print(memory, flush=True)
    atexit.register(say_peak, memory.need)
    if memory.need > free:
        raise UserError(
            f"{what} needs {memory.need / GIB:.1f} GiB on a GPU that has {free / GIB:.1f} GiB free; ask for more GPUs "
            "a task (run.gpus, --gpus-per-node), or lower score.batch_tokens"
        )


def say_peak(planned: int) -> None:
    """What the fullest device really held, beside the plan."""
    real = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    print(f"peak memory a GPU: {real / GIB:.2f} GiB, planned {planned / GIB:.2f}", flush=True)


def load_decoder(folder: str, dtype: str, batch_tokens: int, head_rows: int, check_tokens: int = 0) -> Decoder:
    """The model spread over all visible devices; says what it will take before it takes it, and how fast it came."""
    devices, kind = visible_devices(), getattr(torch, dtype)
    config = load_config(folder)
    family = family_of(config.model_type, "is not one this scorer computes; these are", lambda family: family.shape)
    assert family.shape
    shape, on_host = family.shape(config), False
    if devices[0].type == "cuda":
        free = free_memory(devices)
        memory = plan_decoder(shape, kind.itemsize, batch_tokens, head_rows, len(devices), free, check_tokens)
        announce("the model", memory, free)
        on_host = memory.embed_on_host
    loaded = load_weights(Path(folder), family, shape, kind, devices, on_host)
    gib = loaded.bytes / GIB
    print(f"weights: {gib:.2f} GiB in {loaded.seconds:.1f} s, {gib / loaded.seconds:.2f} GiB/s", flush=True)
    table = rope_table(family, config, kind, max(batch_tokens, ROPE_TOKENS))
    return Decoder(shape, loaded.weights, table, batch_tokens)
