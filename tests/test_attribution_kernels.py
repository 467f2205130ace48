"""Attribution's fused kernels in Triton's interpreter, in float32, against plain torch."""

import os
import subprocess
import sys

from tools import ROOT

CHECK = """
import torch
from lib.attribution import attention, fused, rules, scores

torch.manual_seed(0)

def same(name, a, b, tolerance=1e-5):
    worst = (a - b).abs().max() / b.abs().max()
    assert a.shape == b.shape and b.abs().max() > 0.1 and worst < tolerance, (name, worst)
    print("same", name)

def through(f, *inputs):
    "f's output, and its gradients for a random gradient of the output"
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    return [y.detach(), *(x.grad for x in inputs)]

x, w = torch.randn(3, 7, 96), torch.randn(96)
fast, plain = lambda x: fused.RmsNorm.apply(x, w, 1e-5), lambda x: rules.rms_norm(x, w, 1e-5)
for a, b in zip(through(fast, x), through(plain, x)):
    same("rms_norm", a, b)

gate, up = torch.randn(2, 11, 300), torch.randn(2, 11, 300)
gate[0, :, ::3] = 0
plain = lambda g, u: rules.gated(g, u, torch.nn.SiLU())
for a, b in zip(through(fused.Gated.apply, gate, up), through(plain, gate, up)):
    same("gated", a, b)

# Rope turns q and k as transformers does, attention is torch's; on the way back q, k, v take the rule's factors.
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

def plain(q, k, v):
    qk, value = rules.FACTORS[rule]
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    q, k, v = (rules.Scale.apply(x, f).transpose(1, 2) for x, f in ((q, qk), (k, qk), (v, value)))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3).transpose(1, 2)

attention.FORWARD = attention.BACKWARD_Q = (32, 16, 4, 2)  # so that few tokens are several blocks
attention.BACKWARD_KV = (16, 16, 4, 2)
for rule, rows, T in (("attnlrp", 1, 5), ("cp_lrp", 2, 32), ("gradient", 1, 40)):
    angle = torch.rand(rows, T, 8).repeat(1, 1, 2) * 6
    cos, sin = angle.cos(), angle.sin()
    qkv = [torch.randn(rows, T, heads, 16) for heads in (4, 2, 2)]
    ours = lambda *qkv: attention.RopeAttention.apply(*qkv, cos, sin, 0.3, rule)
    for a, b in zip(through(ours, *qkv), through(plain, *qkv)):
        if rule == "cp_lrp" and b is not None and not b.any():
            assert a is None or not a.any()
        else:
            same("attention", a, b)

for T in (5, 300):
    y, dy = torch.randn(2, T, 300), torch.randn(2, T, 300)
    same("dots", fused.dots(y, dy), scores.signed_neurons(y, dy))
    length = torch.tensor([T - 3, T])
    same("squares", fused.dots(y, y, length), scores.squares(y, length))

for T, J, I in ((5, 140, 150), (70, 33, 270)):
    x, dy, w = torch.randn(3, T, I), torch.randn(3, T, J), torch.randn(J, I)
    same("abs_neurons", fused.abs_neurons(x, dy, w), scores.abs_neurons(x, dy, w))
    for magnitude in (False, True):
        a = torch.randn(J, I)
        b = a.clone()
        fused.add_weights(a, x, dy, w, magnitude), scores.add_weights(b, x, dy, w, magnitude)
        same("add_weights", a, b)
x[1, 2, 3] = float("nan")
assert fused.abs_neurons(x, dy, w).isnan().any(1).tolist() == [False, True, False]
assert fused.dots(x, x, torch.tensor([T, T, T])).isnan().nonzero().tolist() == [[1, 3]]
assert fused.dots(x, x).isnan().nonzero().tolist() == [[1, 3]]

# All of it wired together: the kernels in a whole model.
import sys
sys.path.insert(0, "tests")
from lib.attribution.attribute import Attributor
from lib.attribution import patch
from lrp_models import make, sequences

samples, layers = sequences(5, 12, 9), ("v_proj", "up_proj")
for family, rule, level in (("llama", "attnlrp", "neuron"), ("qwen2", "cp_lrp", "weight")):
    model, found = make(family, head_dim=16, num_hidden_layers=1), []
    for kernels in (lambda x: fused, lambda x: None):
        rules.kernels = scores.kernels = patch.kernels = kernels
        found.append(Attributor(model, rule=rule, layers=layers, level=level, wanda=True).run(samples))
    for kind in ("signed", "abs", "sumsq"):
        for name in found[0].layers:
            same("whole", getattr(found[0], kind)[name], getattr(found[1], kind)[name])

# A mask on the left, which attention's kernel does not know.
mask = torch.ones(2, 12, dtype=torch.long)
mask[1, :5] = 0
found = []
for kernels in (lambda x: fused, lambda x: None):
    rules.kernels = patch.kernels = kernels
    given = model.get_input_embeddings()(torch.tensor(sequences(12, 12))).detach().requires_grad_()
    with patch.patched(model, "attnlrp"):
        model(inputs_embeds=given, attention_mask=mask, use_cache=False).logits[:, -1, 7].sum().backward()
    found.append(given.grad)
same("masked", *found)
"""


def test_fused_kernels_equal_the_plain_ones() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 2 + 3 + 10 + 4 + 6 + 12 + 1
