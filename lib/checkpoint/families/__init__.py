"""A model family is one file beside this one, found by being there: it holds FAMILY. This says what a family says.

Everything that knows one reads it here: counts of parameters, layer names, plans of memory, the scorer's decoder,
attribution's rules, several GPUs. Without torch: what is of transformers is named, and imported by who computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from lib.base.atomic import read_json
from lib.base.errors import UserError, shown

NO_RULES = "has no rules here; these have"
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
LARGEST = 1 << 24  # of these


@dataclass(frozen=True)
class Shape:
    """What a config.json says that matters to the scorer."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    eps: float
    bias: bool  # on q, k, v
    tied: bool  # the output head is the embedding
    head_norms: bool = False  # each head's query and key is normed

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head

    @property
    def layer_parameters(self) -> int:
        """Of a layer's matrix products."""
        return self.hidden * (self.qkv + self.heads * self.head + 3 * self.inner)


@dataclass(frozen=True)
class LinearNames:
    """A layer's linear layers by what they do; names inside the layer."""

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"  # None: the MLP is not gated
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """Last names in forward order, those together that read the same input."""
        groups = ((self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,))
        return tuple(tuple(last(name) for name in group if name) for group in groups)

    @property
    def order(self) -> tuple[str, ...]:
        return sum(self.together, ())


@dataclass(frozen=True)
class Names:
    """Of modules beside the linear layers: of the model, and of one layer."""

    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    stack: str = "model.layers"  # the list of layers
    norm: str = "model.norm"
    head: str = "lm_head"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"


@dataclass(frozen=True)
class Family:
    """A shape function makes it one that the scorer computes; the rest has the defaults of Llama and its relatives."""

    model_type: str  # as config.json has it
    classes: str  # what transformers' classes of it begin with: Llama
    linears: LinearNames = LinearNames()
    names: Names = Names()
    tables: tuple[str, ...] = ("embed_tokens", "lm_head")  # in names of weights that no token is multiplied by
    inner: str = "intermediate_size"  # config.json's word for the MLP's width
    activation: str = "act_fn"  # the module of an MLP
    shape: Callable[[Any], Shape] | None = None  # from a config; a UserError where it is not computed
    window: Callable[[Any], int | None] = lambda config: None  # tokens up to which attention is plainly causal
    spreads: bool = True  # over several GPUs
    fused_attention: bool = False  # it is rope, grouped keys and nothing else, as lib.attribution.attention has it

    @property
    def modeling(self) -> str:
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


def gated_shape(config: Any, *, bias: bool = False, head_norms: bool = False) -> Shape:
    """Of a Llama or a relative: RMS norms, rope, grouped keys, a gated MLP with silu, no biases but on q, k, v."""
    odd = config.hidden_act != "silu" or getattr(config, "mlp_bias", False)
    if odd or getattr(config, "use_sliding_window", False):
        raise UserError(
            f"this {config.model_type} has sliding windows, biases or an activation that is not computed here"
        )
    if not bias and getattr(config, "attention_bias", False):
        raise UserError(f"a {config.model_type} with attention biases is not computed here")
    _must_be_true(config)
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.vocab_size,
        config.rms_norm_eps,
        bias,
        bool(config.tie_word_embeddings),
        head_norms,
    )


def _must_be_true(config: Any) -> None:
    sizes = {name: getattr(config, name) for name in SIZES}
    wrong = [name for name, n in sizes.items() if not (isinstance(n, int) and 0 < n <= LARGEST)]
    if not wrong and sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        wrong = ["num_attention_heads", "num_key_value_heads"]
    if wrong:
        said = ", ".join(f"{name}={shown(sizes[name])}" for name in wrong)
        raise UserError(f"config.json cannot be true of a model: {said}; run `make fetch` again")


def family_of(model_type: str, what: str, able: Callable[[Family], object] = bool) -> Family:
    """The family of that type; a UserError that says `what` cannot be done, and for which it can."""
    found = FAMILIES.get(model_type)
    if found is None or not able(found):
        raise UserError(f"model type '{model_type}' {what}: {', '.join(t for t, f in FAMILIES.items() if able(f))}")
    return found


def family_in(folder: Path, what: str) -> Family:
    """The same of a model's folder."""
    return family_of(_type_of(folder), what)


def tables(folder: Path) -> tuple[str, ...]:
    """Parts of the names of weights that no token is multiplied by: the family's, or, of an unknown one, any's."""
    found = FAMILIES.get(_type_of(folder))
    every = {name: None for family in FAMILIES.values() for name in family.tables}
    return found.tables if found else (*every, "wte", "wpe")


def _type_of(folder: Path) -> str:
    return str((read_json(folder / "config.json") or {}).get("model_type"))


def last(name: str) -> str:
    return name.rpartition(".")[2]


def _found() -> Mapping[str, Family]:
    modules = [import_module(f"{__name__}.{one.name}") for one in iter_modules(__path__)]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


FAMILIES = _found()
