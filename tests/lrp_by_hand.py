"""LRP written out by hand in float64: the reference for lib/attribution. No autograd, and nothing of ours.

Relevance R of a value x is carried as d = R / x, the modified gradient, so that a linear layer needs no rule:
d_in = W^T d_out is LRP-0. One sequence at a time; t, s tokens; o, i outputs and inputs; g key heads, a queries of a key
head, e a head's dimension. The rules (Achtibat et al., AttnLRP, 2024; Ali et al., CP-LRP, 2022):

  product of two values     attnlrp: each gets half           cp_lrp: all for the mixed value, nothing for its weight
  softmax                   attnlrp: Taylor, its gradient     cp_lrp: never reached
  silu                      attnlrp: R passes unchanged       cp_lrp: never reached
  1/std of RMSNorm and LayerNorm  both: a constant
  ReLU                            both: its gradient is R unchanged already
"""

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
SCALE = {"attnlrp": 0.5, "gradient": 1.0, "cp_lrp": 0.0}  # what the weight of a mixture keeps at a product
REST = {"attnlrp": 0.5, "gradient": 1.0, "cp_lrp": 1.0}  # and what the mixed value keeps


@dataclass
class Explained:
    """All that is compared; names are transformers' module names."""

    rule: str
    weights: dict[str, Array]
    logits: Array | None = None  # [t, vocab]
    embedding: Array | None = None  # relevance of each token's embedding [t]
    x: dict[str, Array] = field(default_factory=dict)  # a linear layer's input [t, i]
    z: dict[str, Array] = field(default_factory=dict)  # its output, bias included [t, o]
    d: dict[str, Array] = field(default_factory=dict)  # the output's modified gradient [t, o]

    def linear(self, name: str, x: Array) -> Array:
        self.x[name], self.z[name] = x, x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)
        return self.z[name]

    def linear_back(self, name: str, d: Array) -> Array:
        self.d[name] = d
        return d @ self.weights[f"{name}.weight"]

    def gradient(self, name: str) -> Array:
        """G [o, i]; the relevance of a weight is W * G."""
        return np.einsum("to,ti->oi", self.d[name], self.x[name])

    def relevance(self, name: str) -> Array:
        """The relevance of a layer's outputs, summed over tokens [o]."""
        return np.einsum("to,to->o", self.z[name], self.d[name])


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def norm(x: Array, weight: Array, eps: float, bias: Array | None = None) -> tuple[Array, Array, Array]:
    """RMSNorm, or LayerNorm where there is a bias; also the centred input and the std that `norm_back` wants."""
    centred = x if bias is None else x - x.mean(-1, keepdims=True)
    std = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred / std * weight + (0.0 if bias is None else bias), centred, std


def norm_back(rule: str, d: Array, weight: Array, centred: Array, std: Array, centring: bool) -> Array:
    d = d * weight / std
    if rule == "gradient":
        d = d - centred / std**2 * (d * centred).mean(-1, keepdims=True)
    return d - d.mean(-1, keepdims=True) if centring else d


def rotate(x: Array, inv_freq: Array, back: bool = False) -> Array:
    """Rope over [t, ..., e]: pairs (e, e + half) turned by the position's angle; `back` is the transpose."""
    t, half = len(x), x.shape[-1] // 2
    angle = (np.arange(t)[:, None] * inv_freq).reshape(t, *[1] * (x.ndim - 2), half)
    cos, sin = np.cos(angle), np.sin(-angle if back else angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
    """Causal attention of q [t, g, a, e] over k, v [s, g, e]; the output like q, and the softmax [g, a, t, s]."""
    score = np.einsum("tgae,sge->gats", q, k) * scale
    score[..., ~np.tri(len(q), dtype=bool)] = -np.inf
    p = np.exp(score - score.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("gats,sge->tgae", p, v), p


def attend_back(rule: str, d: Array, q: Array, k: Array, v: Array, p: Array, scale: float) -> tuple[Array, ...]:
    dv = np.einsum("gats,tgae->sge", p, d) * REST[rule]
    dp = np.einsum("tgae,sge->gats", d, v) * SCALE[rule]  # p mixes v
    score = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale * SCALE[rule]  # q and k mix each other
    return np.einsum("gats,sge->tgae", score, k), np.einsum("gats,tgae->sge", score, q), dv


def explain_llama(state: dict, config: object, inv_freq: Array, ids: list[int], seed: Array, rule: str) -> Explained:
    """Llama and Qwen2. `seed` [t, vocab] is L's derivative by the logits: L = sum(seed * logits)."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    e = Explained(rule, w)
    t, g, eps = len(ids), config.num_key_value_heads, config.rms_norm_eps
    shape, scale = (t, g, config.num_attention_heads // g, 2 * len(inv_freq)), (2 * len(inv_freq)) ** -0.5
    norms, attention = {}, {}

    def normed(name: str, x: Array) -> Array:
        y, *norms[name] = norm(x, w[f"{name}.weight"], eps)
        return y

    def normed_back(name: str, d: Array) -> Array:
        return norm_back(rule, d, w[f"{name}.weight"], *norms[name], centring=False)

    layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    h = first = w["model.embed_tokens.weight"][ids]
    for layer in layers:
        x = normed(f"{layer}.input_layernorm", h)
        q, k, v = (e.linear(f"{layer}.self_attn.{n}_proj", x) for n in "qkv")
        q, k, v = rotate(q.reshape(shape), inv_freq), rotate(k.reshape(t, g, -1), inv_freq), v.reshape(t, g, -1)
        mixed, p = attend(q, k, v, scale)
        attention[layer] = q, k, v, p
        h = h + e.linear(f"{layer}.self_attn.o_proj", mixed.reshape(t, -1))
        x = normed(f"{layer}.post_attention_layernorm", h)
        gate, up = e.linear(f"{layer}.mlp.gate_proj", x), e.linear(f"{layer}.mlp.up_proj", x)
        h = h + e.linear(f"{layer}.mlp.down_proj", gate * sigmoid(gate) * up)
    head = "lm_head" if "lm_head.weight" in w else "model.embed_tokens"
    e.logits = e.linear(head, normed("model.norm", h))

    d = normed_back("model.norm", e.linear_back(head, seed))
    for layer in reversed(layers):
        gate, up = e.z[f"{layer}.mlp.gate_proj"], e.z[f"{layer}.mlp.up_proj"]
        dm = e.linear_back(f"{layer}.mlp.down_proj", d)
        dsilu = dm * up * SCALE[rule]  # the gate weighs up
        slope = sigmoid(gate)  # silu(x) / x: R unchanged
        if rule == "gradient":
            slope = slope + gate * slope * (1 - slope)
        dx = e.linear_back(f"{layer}.mlp.gate_proj", dsilu * slope)
        dx = dx + e.linear_back(f"{layer}.mlp.up_proj", dm * gate * sigmoid(gate) * REST[rule])
        d = d + normed_back(f"{layer}.post_attention_layernorm", dx)
        dmixed = e.linear_back(f"{layer}.self_attn.o_proj", d).reshape(shape)
        dq, dk, dv = attend_back(rule, dmixed, *attention[layer], scale)
        turned = {"q": rotate(dq, inv_freq, back=True), "k": rotate(dk, inv_freq, back=True), "v": dv}
        dx = sum(e.linear_back(f"{layer}.self_attn.{n}_proj", turned[n].reshape(t, -1)) for n in "qkv")
        d = d + normed_back(f"{layer}.input_layernorm", dx)
    e.embedding = np.einsum("th,th->t", first, d)
    return e


def explain_opt(state: dict, config: object, ids: list[int], seed: Array, rule: str) -> Explained:
    """OPT with the norms before attention and MLP, and learned positions (which start at row 2)."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    e = Explained(rule, w)
    t, g = len(ids), config.num_attention_heads
    scale = (config.hidden_size // g) ** -0.5
    norms, attention = {}, {}

    def normed(name: str, x: Array) -> Array:
        y, *norms[name] = norm(x, w[f"{name}.weight"], 1e-5, w[f"{name}.bias"])
        return y

    def normed_back(name: str, d: Array) -> Array:
        return norm_back(rule, d, w[f"{name}.weight"], *norms[name], centring=True)

    layers = [f"model.decoder.layers.{i}" for i in range(config.num_hidden_layers)]
    first = w["model.decoder.embed_tokens.weight"][ids]
    h = first + w["model.decoder.embed_positions.weight"][2 : 2 + t]
    for layer in layers:
        x = normed(f"{layer}.self_attn_layer_norm", h)
        q, k, v = (e.linear(f"{layer}.self_attn.{n}_proj", x).reshape(t, g, -1) for n in "qkv")
        mixed, p = attend(q[:, :, None], k, v, scale)
        attention[layer] = q[:, :, None], k, v, p
        h = h + e.linear(f"{layer}.self_attn.out_proj", mixed.reshape(t, -1))
        x = e.linear(f"{layer}.fc1", normed(f"{layer}.final_layer_norm", h))
        h = h + e.linear(f"{layer}.fc2", np.maximum(x, 0))
    head = "lm_head" if "lm_head.weight" in w else "model.decoder.embed_tokens"
    e.logits = e.linear(head, normed("model.decoder.final_layer_norm", h))

    d = normed_back("model.decoder.final_layer_norm", e.linear_back(head, seed))
    for layer in reversed(layers):
        dx = e.linear_back(f"{layer}.fc2", d) * (e.z[f"{layer}.fc1"] > 0)
        d = d + normed_back(f"{layer}.final_layer_norm", e.linear_back(f"{layer}.fc1", dx))
        dmixed = e.linear_back(f"{layer}.self_attn.out_proj", d).reshape(t, g, 1, -1)
        parts = zip("qkv", attend_back(rule, dmixed, *attention[layer], scale), strict=True)
        dx = sum(e.linear_back(f"{layer}.self_attn.{n}_proj", part.reshape(t, -1)) for n, part in parts)
        d = d + normed_back(f"{layer}.self_attn_layer_norm", dx)
    e.embedding = np.einsum("th,th->t", first, d)
    return e
