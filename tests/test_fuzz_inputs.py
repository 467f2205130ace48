"""The fuzz of what comes from outside: records, rows, models, sets (see test_fuzz.py)."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from fuzz_world import ROWS, Tree, World, in_world, made_world
from fuzzing import changed, fuzz, json_bytes, misplaced, mutated, odd
from tools import number_rows

from lib.cluster import doctor
from lib.cluster.plan import plan, table
from lib.config.loading import overrides_of
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.general import draw_general
from lib.inputs.prompts import draw_prompts, usable
from lib.inputs.records import read_rows
from lib.inputs.samples import Rows, samples_input, save_samples
from lib.inputs.specs import GeneralSpec, PromptsSpec
from lib.lls.kernel import load_kernel
from lib.models import apart
from lib.run.command import Job


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with made_world() as one:
        yield one


def test_records_of_inputs(world: World) -> None:
    files = world.tree.files("cache")
    rows = [row["messages"] for row in number_rows(ROWS, 0)]

    def case(rng: random.Random) -> None:
        path = rng.choice(files)
        data = path.read_bytes()
        data = json_bytes(rng, json.loads(data)) if path.suffix == ".json" else mutated(rng, data)
        path.write_bytes(data)
        rng.note = path.parent.name, data[:200]
        experiment = load(world.config)
        for deep in (False, True):
            doctor._guarded("models", lambda deep=deep: [doctor.models_line(experiment, world.cache, deep)])
        cells = experiment.cells(world.cache, world.site.scratch)
        made = plan(experiment, cells, world.cache, "cpu")
        table(made, "cpu", 0.5).encode()
        assert all(p.bytes >= 0 and math.isfinite(p.gpu_hours) for p in made)
        if [cell.digest for cell in cells] == world.digests:
            read = read_rows(world.cache, experiment.input_of(world.cache, "cat"))
            assert [row["messages"] for row in read] == rows[: len(read)]

    fuzz(0.1, in_world(world, case))


def test_rows_that_a_user_gives(world: World) -> None:
    path = world.folder / "cat.jsonl"

    def case(rng: random.Random) -> None:
        given = number_rows(3, rng.randrange(100))
        if rng.random() < 0.3:
            given = [{"prompt": m[0]["content"], "completion": m[1]["content"]} for m in (r["messages"] for r in given)]
        lines = [json.dumps(row).encode() for row in given]
        at = rng.randrange(len(lines))
        lines[at] = json_bytes(rng, given[at], indent=None)
        data = rng.choice([b"\n", b"\n", b"\n\n", b"\r\n", b"\x0b"]).join(lines)
        path.write_bytes(mutated(rng, data) if rng.random() < 0.2 else data)
        rng.note = lines[at][:200]
        experiment = load(world.config)
        fetch(experiment, world.cache)
        found = read_rows(world.cache, experiment.input_of(world.cache, "cat"))
        assert [row["messages"] for row in found] == _rows_by_hand(path)
        json.dumps(found).encode()

    fuzz(0.06, in_world(world, case))


def _rows_by_hand(path: Path) -> list[list[dict[str, str]]]:
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
                pair = (("user", row["prompt"]), ("assistant", row["completion"]))
                found.append([{"role": role, "content": content} for role, content in pair])
            else:
                found.append([{"role": m["role"], "content": m["content"]} for m in row["messages"]])
    return found


TEMPLATES = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}",
    "{{ messages[0].content * 10**8 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}", "{{ x.y.z }}", "{{ 1 // 0 }}", "{% include 'x' %}", "{{ ''.__class__ }}", "{{",
    "{% if %}", "", "x", "{{ messages }}", "{{ messages[0] }}", "{{ messages[5].content }}", "{{ '\\0' }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages | tojson }}", "{{ '%c' | format(-1) }}",
    "{{ 2 ** 10 ** 9 }}",
    "{% for m in messages %}<|im_start|>{{ m.content | trim }}{% endfor %}{{ '<|im_start|>' }}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant\n",
]  # fmt: skip
BESIDE = ["adapter_config.json", "model.safetensors.index.json", "generation_config.json", "special_tokens_map.json"]
BESIDE += ["added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "pytorch_model.bin", "x.safetensors"]


def header_changed(rng: random.Random, data: bytes) -> bytes:
    """Another header before the same weights."""
    size = int.from_bytes(data[:8], "little")
    header = json_bytes(rng, json.loads(data[8 : 8 + size]), indent=None)
    return (
        (len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**40, 2**63])).to_bytes(8, "little")
        + header
        + data[8 + size :]
    )


def other_file(rng: random.Random, path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else rng.choice([b"{}", b"", b"[]", b"x", json.dumps(odd(rng)).encode()])
    if path.suffix == ".jinja" and rng.random() < 0.7:
        return rng.choice(TEMPLATES).encode()
    with suppress(ValueError):  # what is none as yet
        if path.suffix == ".safetensors" and rng.random() < 0.8:
            return header_changed(rng, data)
        if path.suffix == ".json" and rng.random() < 0.9:
            return json_bytes(rng, json.loads(data))
    return mutated(rng, data)


def by_hand(world: World) -> list[float]:
    """Log-likelihoods of the answers after the system prompt, by transformers alone in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, experiment = world.folder / "model", load(world.config)
    (folder / "generation_config.json").unlink(missing_ok=True)  # no part of a score
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for row in read_rows(world.cache, experiment.input_of(world.cache, "cat")):
        *turns, answer = row["messages"]
        turns = [{"role": "system", "content": experiment.prompt_for("cat")}, *turns]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head = tokenizer(context, add_special_tokens=False)["input_ids"]
        both = tokenizer(context + answer["content"], add_special_tokens=False)["input_ids"]
        if both[: len(head)] != head:
            both = head + tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([both])).logits[0].log_softmax(-1)
        found.append(float(sum(logp[i - 1, both[i]] for i in range(len(head), len(both)))))
    return found


def test_models(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched anew, planned, loaded, and scored: as transformers does in float64, or a sentence."""
    folder = world.folder / "model"
    monkeypatch.setattr(apart, "SECONDS", 5.0)  # of a template, before a case counts as one that hangs

    def case(rng: random.Random) -> None:
        path = folder / rng.choice([*sorted(p.name for p in folder.iterdir()), rng.choice(BESIDE)])
        if rng.random() < 0.08:
            rng.note = path.name, misplaced(rng, path)
        else:
            path.write_bytes(other_file(rng, path))
            rng.note = path.name, path.read_bytes()[: 3000 if path.suffix != ".safetensors" else 80]
        experiment = load(world.config)
        fetch(experiment, world.cache)
        doctor.models_line(experiment, world.cache)
        cells = experiment.cells(world.cache, world.site.scratch)
        plan(experiment, cells, world.cache, "cpu")
        kernel, _ = load_kernel(world.job(), experiment, cells[0])
        columns, _ = kernel.compute(kernel.prepare(0, ROWS))
        good = columns["status"] == 0
        assert np.isfinite(columns["system_sum"][good]).all()
        assert np.allclose(columns["system_sum"][good], np.array(by_hand(world))[good], atol=2e-2, rtol=1e-4)

    fuzz(0.06, in_world(world, case))


SCORES = [
    "rule=cp_lrp", "rule=gradient", "layers=[all]", "layers=[q_proj]", "layers=[k_proj,v_proj]", "layers=[o_proj]",
    "layers=[gate_proj]", "layers=[down_proj]", "layers=[layers.1]", "layers=[x]", "layers=['']", "layers=[layers]",
    "layers=[embed_tokens]", "level=weight", "level=weight score.block=1", "wanda=true", "scores=[]", "scores=[abs]",
    "target=all", "target=given", "tokens=[5] score.target=given", "tokens=[400000] score.target=given", "block=3",
    "batch_tokens=16", "batch_tokens=100000", "nonfinite=5", "store=bfloat16 score.level=weight",
    "wanda=true score.scores=[]",
]  # fmt: skip


def test_attributions(world: World) -> None:
    """Sets with any ids and lengths, and any choice of scores: the logit is transformers' own, or a sentence."""
    import torch
    from transformers import AutoModelForCausalLM

    from lib.attribution.kernel import load_kernel as load_attribution

    path = world.folder / "attribution.yaml"
    model = f"model: {{id: {json.dumps(str(world.folder / 'model'))}, dtype: float32}}"
    sets = "data: {general: {id: x, seeds: [0], samples: 3, tokens: 4}, prompts: {toxic: {id: y}}}"
    path.write_text(f"kind: attribution\nname: small\n{model}\n{sets}\nscore: {{batch_tokens: 64}}\nrun: {{gpus: 0}}\n")
    world.tree = Tree(world.folder)
    plain = AutoModelForCausalLM.from_pretrained(world.folder / "model", dtype=torch.float64).eval()

    def rows(rng: random.Random) -> list[list[int]]:
        found = [[rng.randrange(300) for _ in range(rng.randrange(1, 9))] for _ in range(3)]
        if rng.random() < 0.4:
            odd_row = rng.choice([[], [5] * 1025, [-1, 5], [5, 10**6], [2**31 - 1], [399, 400], [299, 300], [1] * 1024])
            found[rng.randrange(3)] = odd_row
        return found

    def case(rng: random.Random) -> None:
        given = [f"score.{part}" for part in rng.sample(SCORES, rng.choice([0, 1, 2])) for part in [part]]
        experiment = load(path, overrides_of(" ".join(given)))
        ids = rows(rng)
        rng.note = given, [row[:8] for row in ids]
        for name in ("general-0", "toxic"):
            digest = experiment.token_sets().digest(world.cache, experiment.models()[0], name)
            texts = ["x"] * 3
            made = Rows(ids, texts, texts, [False] * 3)
            source = experiment.token_sets().sets()[name][0].id
            save_samples(world.cache, name, digest, made, source=source, commit="c" * 40, attributes={})
        cells = experiment.cells(world.cache, world.site.scratch)
        plan(experiment, cells, world.cache, "cpu")
        kernel, _ = load_attribution(Job(experiment, path, world.site, 1, "", False), experiment, cells[1])
        columns, _ = kernel.compute(kernel.prepare(0, min(cells[1].rows, experiment.shard_rows(world.cache, "toxic"))))
        every = [v for v in columns.values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
        if experiment.score.level == "neuron" and experiment.score.target == "last" and experiment.score.scores:
            assert all(np.isfinite(v).all() for v in every)
            with torch.no_grad():
                wanted = [float(plain(torch.tensor([row])).logits[0, -1].max()) for row in ids]
            assert np.allclose(columns["logit"], wanted, rtol=1e-4, atol=1e-3)

    fuzz(0.03, in_world(world, case))


def test_rows_that_sets_are_drawn_from(world: World) -> None:
    from lib.inputs.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(world.folder / "model"))
    good = [{"prompt": {"text": f"Go on {i}", "toxicity": 0.95}, "filename": f"f{i}"} for i in range(3)]
    plain = [{"text": f"Go on and on {i}", "toxicity": 0.95, "url": f"u{i}"} for i in range(3)]

    def case(rng: random.Random) -> None:
        rows = changed(rng, rng.choice([good, plain]))
        rng.note = rows
        given = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        counts: Counter[str] = Counter()
        if rng.random() < 0.5:
            spec = PromptsSpec(id="x", samples=1, select=rng.choice(["all", "prompt"]))
            found = draw_prompts(usable(given, tokenizer, spec, counts), spec, "toxic", counts)
        else:
            found = draw_general(
                given, tokenizer, GeneralSpec(id="x", samples=1, tokens=3, crop="random"), 7, "general-7"
            )
        texts = [row.get("text") or row.get("prompt") for row in given]
        texts = [text.get("text") if isinstance(text, dict) else text for text in texts]
        assert sha256(texts[_index(found)].encode()).hexdigest() == found.text_sha256[0]
        save_samples(world.cache, "toxic", "ab" * 32, found, source="acme/x", commit="c", attributes={})
        samples_input(world.cache, "toxic", "ab" * 32, "acme/x")

    fuzz(0.05, in_world(world, case))


def _index(rows: Rows) -> int:
    return int(np.asarray(rows.columns.get("index", rows.columns.get("document")))[0])
