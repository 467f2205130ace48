"""OPT: learned positions, layer norms, biases everywhere, an MLP without a gate. Attribution alone computes it."""

from lib.checkpoint.families import Family, LinearNames, Names

FAMILY = Family(
    "opt",
    "OPT",
    linears=LinearNames(o="self_attn.out_proj", gate=None, up="fc1", down="fc2"),
    names=Names(embedding="model.decoder.embed_tokens", stack="model.decoder.layers"),
    tables=("embed_tokens", "embed_positions", "lm_head"),
    inner="ffn_dim",
    activation="activation_fn",
    spreads=False,
)
