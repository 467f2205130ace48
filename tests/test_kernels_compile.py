"""Every Triton kernel compiles to machine code for the GPUs we name, and its shared memory is there. No GPU is needed:
Triton is told which one to build for, and nothing is launched."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lib.attribution import attention, fused
from lib.checkpoint.families import Shape
from lib.lora import attention as rows
from lib.lora import triton_ops as training
from lib.models import triton_ops

# Compute capability -> bytes of shared memory a block may ask for (CUDA C++ programming guide, compute capabilities)
SHARED = {"A100": (80, 163 << 10), "H200": (90, 227 << 10), "B200": (100, 227 << 10), "RTX 4090": (89, 99 << 10)}
HEADS = {"Llama-3-8B": (32, 8, 128), "Qwen2.5-0.5B": (14, 2, 64)}


class Known(Exception):
    """What runs on this card is there: NVIDIA's machine code for 8.0 is that of 8.9, too (CUDA C++ programming guide,
    binary compatibility), where the same is to be made of it."""


known: dict[str, int] = {}  # a kernel's IR, before it becomes machine code of 8.x -> the shared memory it asks for


@pytest.fixture(params=SHARED)
def built(request, monkeypatch, tmp_path):
    """(kernel, shared memory it asks for) of whatever is called meanwhile, built for one GPU."""
    capability, limit = SHARED[request.param]
    found, run, lower = [], JITFunction.run, CUDABackend.make_llir

    def build(kernel, *args, grid, warmup, **options):
        try:
            made = run(kernel, *args, grid=grid, warmup=True, **options)
        except Known as e:
            found.append((kernel.__name__, e.args[0]))
            return
        assert made.asm["cubin"]
        found.append((kernel.__name__, made.metadata.shared))

    def make_llir(backend, ir, metadata, options, arch):
        same = str(ir).replace(f"cuda:{arch}", "cuda:8x")
        if arch // 10 == 8 and same in known:
            raise Known(known[same])
        made = lower(backend, ir, metadata, options, arch)
        if arch == 80:
            known[same] = metadata["shared"]
        return made

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # it takes a tenth of the time, and changes no code
    monkeypatch.setattr(driver, "_active", target)
    monkeypatch.setattr(JITFunction, "run", build)
    monkeypatch.setattr(CUDABackend, "make_llir", make_llir)
    for module in (fused, attention):
        monkeypatch.setattr(module, "small", lambda device: limit < 140_000)
    return SimpleNamespace(gpu=request.param, kernels=found, limit=limit)


def half(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16)


def attribution(tokens: int, widths: list[str]) -> None:
    samples, hidden, inner = 2, 4096, 14336
    x, y, weight = half(samples, tokens, hidden), half(samples, tokens, inner), half(inner, hidden)
    fused.RmsNorm.apply(x.requires_grad_(), half(hidden), 1e-5).backward(x)
    gate = half(samples, tokens, inner).requires_grad_()
    fused.Gated.apply(gate, y).backward(y)
    x = x.detach()
    fused.dots(y, y)
    fused.dots(x, x, torch.ones(samples, dtype=torch.long))
    fused.abs_neurons(x, y, weight)
    for heads, keys, width in map(HEADS.get, widths):
        q, k, v = (half(samples, tokens, n, width).requires_grad_() for n in (heads, keys, keys))
        cos, sin = half(1, tokens, width), half(1, tokens, width)
        attention.RopeAttention.apply(q, k, v, cos, sin, width**-0.5, "attnlrp").backward(half(*q.shape))


def sums(tokens: int) -> None:
    """Of weights; small ones: the long samples' products are computed here."""
    total, x, y = torch.empty(256, 128), half(2, tokens, 128), half(2, tokens, 256)
    for magnitude in (False, True):
        fused.add_weights(total, x, y, half(256, 128), magnitude)


def scoring() -> None:
    tokens, hidden, inner, vocabulary, prefix = 512, 3584, 18944, 152064, 40
    triton_ops.rms_norm(half(tokens, hidden), half(hidden), 1e-6, half(tokens, hidden))
    triton_ops.swiglu(half(tokens, 2 * inner), half(tokens, inner))
    triton_ops.log_prob(half(8, vocabulary), torch.zeros(8, dtype=torch.long))
    triton_ops.log_sums(half(8, vocabulary), torch.ones(vocabulary, dtype=torch.bool))
    segments = np.array([[0, tokens, 0, 0]])
    for heads, keys, width in HEADS.values():
        q, k, v = (half(tokens, n, width) for n in (heads, keys, keys))
        cos, sin = torch.empty(tokens, width), torch.empty(tokens, width)
        triton_ops.split_qkv(half(tokens, (heads + 2 * keys) * width), q, k, v, cos, sin)
        tiles = torch.from_numpy(triton_ops.tiles(segments, heads // keys))
        triton_ops.attend(q, half(2, tokens, keys, width), half(2, prefix, keys, width), tiles, half(*q.shape))


def students(ranks: int) -> None:
    """Of both ways through a layer, and the loss."""
    tokens, hidden, inner, vocabulary = 512, 3584, 18944, 152064
    x, wide, weight, t = half(tokens, hidden), half(tokens, hidden + 64), half(hidden), half(tokens, ranks)
    training.rms_norm(x, weight, 1e-6, wide[:, :hidden])
    training.add_rms_norm_backward(wide[:, :hidden], x, weight, 1e-6, wide[:, :hidden])
    training.add_adapter(x, wide[:, :hidden], t, half(hidden, ranks), x)
    gate_up, down = half(tokens, 2 * inner), half(ranks, inner)
    training.swiglu(gate_up, down, half(tokens, inner), t)
    sums = torch.empty(2 * inner, ranks), torch.empty(ranks, inner)
    training.swiglu_backward(gate_up, half(tokens, inner), t, t, *sums)
    target, share = torch.zeros(8, dtype=torch.long), torch.ones(1)
    training.loss_backward(half(8, vocabulary), target, share, torch.empty(8))
    for heads, keys, width in HEADS.values():
        shape = Shape(1, hidden, inner, heads, keys, width, vocabulary, 1e-6, True, True)
        qkv, out = half(tokens, shape.qkv), half(tokens, heads * width)
        segments = training.Segments.empty(shape, tokens, 4, torch.device("cpu"))
        level, cos = torch.empty(tokens, heads), torch.empty(tokens, width)
        training.rotate(qkv, cos, cos, shape)
        training.rotate(qkv, cos, cos, shape, back=True)
        training.attend(qkv, segments, shape, out, level)
        training.attend_backward(qkv, segments, shape, out, level, level, out, qkv)


def test_kernels_compile_and_fit(built):
    """Full tiles of long samples, and ragged ones of short. Of these the narrow heads' differ from the wide ones' in
    numbers alone and take less memory: they are built for the smallest card and the one that most runs are on."""
    attribution(2048, list(HEADS))
    attribution(24, list(HEADS)[: 2 if built.gpu in ("RTX 4090", "H200") else 1])
    sums(128), sums(32)
    scoring()
    students(16 if built.gpu != "H200" else 128)  # gate's and up's, of ranks 8 and 64
    every = {
        k
        for m in (fused, attention, triton_ops, rows, training)
        for k, f in vars(m).items()
        if isinstance(f, JITFunction)
    }
    inner = {"_load", "_dq_part", "_dkv_part", "_rows_of"}  # called by kernels
    assert {name for name, _ in built.kernels} == every - inner
    assert not [(name, shared) for name, shared in built.kernels if shared > built.limit]
