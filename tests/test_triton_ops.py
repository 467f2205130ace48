"""The fused kernels in Triton's interpreter, in float32, against plain torch."""

import os
import subprocess
import sys

from tools import ROOT

CHECK = """
import numpy as np, torch
from lib.bench.probe import kernel_line
from lib.models import plain_ops, triton_ops
from lib.models.packing import Item, pack

torch.manual_seed(0)
rng = np.random.default_rng(0)

def same(name, a, b, tolerance=2e-6):
    worst = (a - b).abs().max().item()
    assert a.abs().max() > 0.1 and worst < tolerance, (name, worst)
    print("same", name)

x, w = torch.randn(5, 96), torch.randn(96)
a, b = torch.empty_like(x), torch.empty_like(x)
triton_ops.rms_norm(x, w, 1e-6, a), plain_ops.rms_norm(x, w, 1e-6, b)
same("rms_norm", a, b)

x = torch.randn(5, 2 * 300)
a, b = torch.empty(5, 300), torch.empty(5, 300)
triton_ops.swiglu(x, a), plain_ops.swiglu(x, b)
same("swiglu", a, b)

for heads, kv, d in ((6, 2, 16), (4, 4, 32), (7, 1, 16)):
    qkv, cos, sin = torch.randn(9, (heads + 2 * kv) * d), torch.randn(9, d), torch.randn(9, d)
    a, b = ([torch.zeros(9, n, d) for n in (heads, kv, kv)] for _ in range(2))
    triton_ops.split_qkv(qkv, *a, cos, sin), plain_ops.split_qkv(qkv, *b, cos, sin)
    for i, j in zip(a, b):
        same("split_qkv", i, j)

logits, target = torch.randn(3, 9000) * 9, torch.tensor([0, 8999, 5000])
same("log_prob", triton_ops.log_prob(logits, target), plain_ops.log_prob(logits, target), 1e-5)
line = kernel_line("cpu")  # of the probe
assert line.level == "ok" and "log_prob is within" in line.found, line
right, plain_ops.log_prob = plain_ops.log_prob, lambda logits, target: -target.float()
assert kernel_line("cpu").level == "FAIL"
plain_ops.log_prob = right
marked = torch.arange(9000) % 7 == 3
for ours, plain in zip(triton_ops.log_sums(logits, marked), plain_ops.log_sums(logits, marked)):
    same("log_sums", ours, plain, 1e-5)
assert (plain_ops.log_sums(logits, marked)[1] < plain_ops.log_sums(logits, marked)[0]).all()
logits[1, 77] = float("nan")
assert triton_ops.log_sums(logits, marked)[0].isnan().tolist() == [False, True, False]
assert triton_ops.log_prob(logits, target).isnan().tolist() == [False, True, False]

items = [Item(tuple(range(n)), tuple(range(m))) for n, m in rng.integers(1, 40, (7, 2))]
items[3] = Item(items[2].context, items[3].response)  # two responses to one context
for heads, kv, prefix in ((6, 2, 11), (4, 4, 0), (7, 1, 70)):
    batch = next(pack(items, prefix, 400))
    q, keys = torch.randn(400, heads, 16), torch.randn(2, 400, kv, 16)
    cached = torch.randn(2, prefix, kv, 16) if prefix else None
    a, b = torch.zeros_like(q), torch.zeros_like(q)
    triton_ops.attend(q, keys, cached, torch.from_numpy(triton_ops.tiles(batch.segments, heads // kv)), a)
    plain_ops.attend(q, keys, cached, batch.segments.tolist(), b)
    same("attend", a, b)
"""


def test_fused_kernels_equal_plain_torch():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 3 + 9 + 5
