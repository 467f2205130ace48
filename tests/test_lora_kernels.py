"""The trainer's fused kernels in Triton's interpreter, in float32, against plain torch."""

import os
import subprocess
import sys

from tools import ROOT

CHECK = """
import numpy as np
import torch
from lib.checkpoint.families import Shape
from lib.lora import plain_ops, triton_ops

torch.manual_seed(0)

def same(name, a, b, tolerance=2e-5):
    worst = (a - b).abs().max() / b.abs().max()
    assert a.shape == b.shape and b.abs().max() > 0.01 and worst < tolerance, (name, worst)
    print("same", name)

def both(name, run):
    "run(ops) for the kernels and for plain torch, from the same state of the generator"
    state, found = torch.get_rng_state(), []
    for ops in (triton_ops, plain_ops):
        torch.set_rng_state(state)
        found.append(run(ops))
    for a, b in zip(*found):
        same(name, a, b)

def norms(ops):
    x, w, wide, dy = torch.randn(7, 96), torch.randn(96), torch.zeros(7, 112), torch.randn(7, 128)
    g = torch.randn(7, 112)
    ops.rms_norm(x, w, 1e-5, wide[:, :96])
    ops.add_rms_norm_backward(dy[:, :96], x, w, 1e-5, g[:, :96])
    return wide, g

both("norm", norms)

def turned(ops):
    qkv, angle = torch.randn(9, 10 * 16), torch.rand(9, 16) * 6
    back = qkv.clone()
    ops.rotate(qkv, angle.cos(), angle.sin(), shape)
    ops.rotate(back, angle.cos(), angle.sin(), shape, back=True)
    return qkv, back

shape = Shape(1, 32, 48, 6, 2, 16, 97, 1e-5, True, True)
both("rotate", turned)

def attended(ops):
    # a row of one token, one that ends a tile, one of several tiles; what is beyond them is nobody's
    segments = np.array([[0, 1], [1, 64], [65, 75], [140, 4]], np.int32)
    tokens = 256
    rows = ops.Segments.empty(shape, tokens, 8, torch.device("cpu"))
    rows.put(segments)
    qkv, dout = torch.randn(tokens, 10 * 16), torch.randn(tokens, 6 * 16)
    out, dqkv = torch.zeros(tokens, 6 * 16), torch.zeros(tokens, 10 * 16)
    lse, delta = torch.zeros(tokens, 6), torch.zeros(tokens, 6)
    ops.attend(qkv, rows, shape, out, lse)
    ops.attend_backward(qkv, rows, shape, out, lse, delta, dout, dqkv)
    assert not out[144:].any() and not dqkv[144:].any()
    return out, dqkv

both("attention", attended)

def gated(ops, f=600):
    m, gate_up, a, inner, t = 70, torch.randn(70, 2 * f), torch.randn(16, f), torch.zeros(70, f), torch.zeros(70, 16)
    ops.swiglu(gate_up, a, inner, t)
    dinner, x, dx = torch.randn(m, f), torch.randn(m, 50), torch.randn(m, 40)
    db, da = torch.zeros(2 * f, 48), torch.zeros(16, f)
    ops.swiglu_backward(gate_up, dinner, x[:, :48], dx[:, :16], db, da)
    return inner, t, gate_up, db, da

both("gated", gated)

def added(ops):
    out = torch.zeros(70, 200)
    x, y, t = torch.randn(70, 200), torch.randn(70, 220)[:, :200], torch.randn(70, 40)[:, :32]
    ops.add_adapter(x, y, t, torch.randn(200, 32), out)
    return (out,)

both("added", added)

def losses(ops):
    logits, target = torch.randn(5, 9001) * 3, torch.tensor([3, 9000, -1, 0, 4096])
    loss = torch.zeros(5)
    ops.loss_backward(logits, target, torch.tensor([0.25]), loss)
    assert loss[2] == 0 and not logits[2].any()
    return loss, logits

both("loss", losses)
"""


def test_kernels_equal_plain_torch():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n").count("same loss") == 2 and done.stdout.count("same gated") == 5
