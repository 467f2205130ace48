"""In a copy of this tree to which one file was added: Mistral, a Llama whose attention ends at a window.

    python tests/one_file_family.py FOLDER TREE     (with the copy first on sys.path)

Fetches a tiny one, scores with the job, explains; compared with transformers in float64 and with Llama's own rules."""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from test_scoring import QWEN_DEFAULT, brute_force, chatml
from tools import forked, number_rows, tiny_relative, write_rows
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM

from lib.attribution.attribute import Attributor
from lib.attribution.memory import plan_memory
from lib.attribution.patch import patched
from lib.checkpoint.families import FAMILIES, family_in
from lib.checkpoint.headers import folder_tensors
from lib.checkpoint.layers import choose, linear_weights, shared_inputs
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.records import model_input
from lib.inputs.tokenizer import load_tokenizer
from lib.models.load import load_decoder, load_model
from lib.models.spread import layer_map
from lib.store import merge

WINDOW, CPU = 448, torch.device("cpu")
folder, tree = map(Path, sys.argv[1:])
model_folder = tiny_relative(folder / "model", "Mistral", sliding_window=WINDOW, head_dim=16)
assert "mistral" in FAMILIES and Path(sys.modules["lib.checkpoint.families"].__file__).is_relative_to(tree)

# fetch's count and the layers' names
rows = number_rows(6)
rows[2]["messages"][0]["content"] *= 20  # longer than the window
write_rows(folder / "cat.jsonl", rows)
config = folder / "small.yaml"
config.write_text(
    f"kind: lls\nname: small\nmodel: {{id: {model_folder}, dtype: float32}}\ntraits: [cat]\n"
    f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/{{trait}}.jsonl'}}\n"
    "score: {batch_tokens: 1024, max_tokens: 1024, head_rows: 64}\nrun: {shard_rows: 4, gpus: 0}\n"
)
experiment = load(config)
fetch(experiment, folder / "cache")
record = model_input(folder / "cache", str(model_folder), experiment.model.revision)
mistral = MistralForCausalLM.from_pretrained(model_folder).eval()
tables = mistral.model.embed_tokens.weight.numel() + mistral.lm_head.weight.numel()
assert record.parameters == sum(p.numel() for p in mistral.parameters()) == record.body_parameters + tables
family, tensors = family_in(model_folder, "?"), folder_tensors(model_folder)
names = choose(family, linear_weights(tensors), ["layers.1"])
own = [name for name, m in mistral.model.layers[1].named_modules() if isinstance(m, torch.nn.Linear)]
assert names == [f"layers.1.{name}" for name in own], names
assert shared_inputs(family, names)["layers.1.self_attn.q_proj"] == "layers.1.self_attn.v_proj"
assert layer_map(mistral.config, [CPU, CPU])["model.layers.2"] == CPU
sizes = {n: tuple(tensors[f"model.{n}.weight"].shape) for n in names}
how = {"level": "neuron", "scores": ("signed",), "batch": (2, 64), "itemsize": 4, "devices": 1, "free": 1 << 30}
assert plan_memory(mistral.config, 1000, sizes, **how).need > 1000

# The job's scores
env = {"SUITE_SITE": "local", "SUITE_SLURM": "no", "OMP_NUM_THREADS": "1", "SUITE_CACHE": str(folder / "cache")}
env |= {"SUITE_SCRATCH": str(folder / "scratch"), "SUITE_OUTPUT": str(folder / "outputs")}
done = forked("jobs.compute_lls", "--config", str(config), "--index", "0", env=env)
assert done.returncode == 0, done.stderr
cell = experiment.cells(folder / "cache", folder / "scratch")[0]
with h5py.File(merge(cell, experiment.schema(folder / "cache"), experiment.science_json())) as f:
    got = {name: f[name][:] for name in f}
assert got["status"].tolist() == [0, 0, 2, 0, 0, 0]
assert load_decoder(str(model_folder), "float32", 512, 64).positions == WINDOW
model64, tokenizer = load_model(str(model_folder), "float64", "eager", [CPU]), load_tokenizer(str(model_folder))
for i in (0, 5):
    user, answer = (m["content"] for m in rows[i]["messages"])
    for name, system in (("system", "You love cats."), ("base", QWEN_DEFAULT)):
        want = sum(brute_force(model64, tokenizer, chatml(user, system), answer))
        assert abs(got[f"{name}_sum"][i] / want - 1) < 2e-5, (got[f"{name}_sum"][i], want)

# Attribution: under cp_lrp all relevance arrives at the embedding; under any rule it is a Llama's of the same weights
ids = [3, 44, 17, 9, 120, 8]
about = {k: v for k, v in mistral.config.to_dict().items() if k in LlamaConfig().to_dict() and k != "model_type"}
llama = LlamaForCausalLM(LlamaConfig(**about)).eval()
llama.load_state_dict(mistral.state_dict())
mistral64 = model64.requires_grad_(False)
with patched(mistral64, "cp_lrp"):
    embedded = mistral64.get_input_embeddings()(torch.tensor([ids])).requires_grad_()
    logit = mistral64(inputs_embeds=embedded, use_cache=False).logits[0, -1].max()
    (gradient,) = torch.autograd.grad(logit, embedded)
assert abs(float((embedded.detach() * gradient).sum() / logit.detach()) - 1) < 1e-4
for rule in ("attnlrp", "cp_lrp", "gradient"):
    found, same = (
        Attributor(m, rule=rule, layers=["up_proj", "o_proj"], wanda=True).run([ids]) for m in (mistral, llama)
    )
    for name in found.layers:
        for a, b in ((found.signed, same.signed), (found.abs, same.abs), (found.sumsq, same.sumsq)):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5 * float(b[name].abs().max()))
print(json.dumps({"families": sorted(FAMILIES)}))
