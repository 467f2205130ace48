"""What a node with a GPU can say of itself in a minute: its driver, torch, a kernel of ours, how scratch reads."""

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from lib.base.atomic import write_json
from lib.base.errors import one_line
from lib.cluster.gpus import gpu_lines, gpus_here, torch_cuda
from lib.cluster.probe import ANSWER, DATA
from lib.cluster.request import Line
from lib.models import plain_ops, triton_ops
from lib.run.site import Site

VOCABULARY = 152064  # Qwen2.5's


def answer(folder: Path, site: Site) -> None:
    lines = [*node_lines(site), scratch_line(folder / DATA)]
    gpus = gpus_here(site.env)
    write_json(folder / ANSWER, {"driver": gpus[0][0] if gpus else "", "lines": [asdict(line) for line in lines]})


def node_lines(site: Site) -> Iterator[Line]:
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    gpus = gpus_here(site.env)
    if not gpus:
        yield Line(
            "FAIL", "gpu", f"no GPU on node {node}: nvidia-smi lists none", "a partition or constraint with GPUs"
        )
        return
    yield Line("ok", "gpu", f"node {node} has {', '.join(name for _, _, name in gpus)}")
    yield from gpu_lines(site.env, torch_cuda(), site.gpu, slurm=True)
    try:
        computed = torch.ones(1000, device="cuda").cumsum(0)[-1].item()
    except (RuntimeError, AssertionError) as e:  # a CPU build asserts
        yield Line(
            "FAIL",
            "cuda",
            f"torch {torch.__version__} does not compute: {one_line(e)}",
            "the lines above, and CUDA_VISIBLE_DEVICES",
        )
        return
    good = computed == 1000
    yield Line("ok" if good else "FAIL", "cuda", f"torch {torch.__version__} counts to {computed:g} of 1000")
    yield kernel_line("cuda")


def kernel_line(device: str) -> Line:
    """A kernel of ours, compiled on the spot, against plain torch."""
    torch.manual_seed(0)
    logits, target = torch.randn(8, VOCABULARY, device=device) * 9, torch.arange(8, device=device) * 1000
    began = time.monotonic()
    try:
        ours = triton_ops.log_prob(logits, target)
        worst = (ours - plain_ops.log_prob(logits, target)).abs().max().item()
    except Exception as e:  # whatever Triton, its compiler or the driver raises
        return Line(
            "FAIL", "triton", f"no kernel runs: {type(e).__name__}: {one_line(e)}", "see `slurm/logs`, and a C compiler"
        )
    found = f"log_prob is within {worst:.1g} of plain torch, {time.monotonic() - began:.1f} s with its compilation"
    return (
        Line("ok", "triton", found)
        if worst < 1e-4
        else Line("FAIL", "triton", found, "report it: the kernel is wrong here")
    )


def scratch_line(path: Path) -> Line:
    began = time.monotonic()
    try:
        data = path.read_bytes()
    except OSError as e:
        return Line("FAIL", "read", f"{path} cannot be read here: {e.strerror}", "SUITE_SCRATCH=<what all nodes see>")
    seconds = time.monotonic() - began
    return Line(
        "ok", "read", f"{len(data) / 2**20:.0f} MiB of {path.parent.parent} at {len(data) / 2**30 / seconds:.2g} GiB/s"
    )
