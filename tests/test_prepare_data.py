"""Sets of samples from local folders with the datasets' layouts, checked against plain readings of the same files."""

import gzip
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from sample_sets import ASKED, BOS, BUFFER, SAMPLES, TOKENS, Place, Sets, bos_model, made, sets, shard_rows
from tools import ROOT, write_rows

from lib.base.errors import UserError
from lib.demo.texts import write_demo_texts
from lib.inputs.fetch import fetch
from lib.inputs.general import draw_general
from lib.inputs.prompts import draw_prompts, usable
from lib.inputs.samples import samples_folder, save_samples
from lib.inputs.specs import GeneralSpec, PromptsSpec
from lib.inputs.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    write_demo_texts(folder / "texts")
    return Place(folder, bos_model(folder / "model"))


@pytest.fixture(scope="module")
def first(place) -> tuple[Sets, Path]:
    """Sets that start where their documents do."""
    experiment = place.sets(prompts={"held_out": True})
    fetch(experiment, place.folder / "first")
    return experiment, place.folder / "first"


@pytest.fixture(scope="module")
def random(place) -> tuple[Sets, Path]:
    experiment = place.sets(crop="random")
    fetch(experiment, place.folder / "random")
    return experiment, place.folder / "random"


@pytest.mark.parametrize("crop", ["first", "random"])
def test_general_samples_are_slices_of_the_documents_that_they_name(place, request, crop):
    experiment, cache = request.getfixturevalue(crop)
    documents, bos, offsets = place.documents(), place.ids("")[0], []
    for seed in range(3):
        record, found = made(experiment, cache, f"general-{seed}")
        assert (record.rows, record.attributed, record.tokens, record.longest) == (12, 12, 12 * 300, 300)
        for i, ids in enumerate(found.ids):
            text, offset = documents[found.source[i]], int(found.columns["offset"][i])
            whole = place.ids(text)
            assert ids.tolist() == whole[offset : offset + TOKENS] and len(ids) == TOKENS
            assert found.columns["text_sha256"][i] == hashlib.sha256(text.encode()).hexdigest()
            assert int(found.columns["document_tokens"][i]) == len(whole)
            assert ids.tolist().count(bos) == (offset == 0), "a BOS just at a document's start, and one"
            if crop == "random":
                rng = np.random.Generator(np.random.PCG64([seed, int(found.columns["document"][i])]))
                assert offset == rng.integers(0, len(whole) - TOKENS + 1)
            offsets.append(offset)
    assert set(offsets) == {0} if crop == "first" else len(set(offsets)) > 30


def test_general_samples_are_the_first_of_the_shuffled_stream_that_are_long_enough(place, first):
    experiment, cache = first
    for seed in range(3):
        stream = load_dataset(str(place.folder / "texts/c4"), "en", split="train", streaming=True)
        order = [row["url"] for row in stream.shuffle(seed=seed, buffer_size=BUFFER)]
        documents = place.documents()
        assert sorted(order) == sorted(documents)
        long = [url for url in order if len(place.ids(documents[url])) >= TOKENS]
        record, found = made(experiment, cache, f"general-{seed}")
        assert found.source == long[:SAMPLES]
        assert [order[i] for i in found.columns["document"]] == found.source
        read = order.index(found.source[-1]) + 1
        assert (record.facts["documents"], record.facts["too_short"]) == (read, read - SAMPLES)
    assert any(made(experiment, cache, f"general-{s}")[0].facts["too_short"] for s in range(3))


def test_seeds_differ_and_a_seed_is_the_same_bytes_in_another_cache(place, first, tmp_path):
    experiment, cache = first
    fetch(experiment, tmp_path)
    for name in experiment.data.sets():
        assert made(experiment, tmp_path, name)[0] == made(experiment, cache, name)[0]
    drawn = [set(made(experiment, cache, f"general-{s}")[1].source) for s in range(3)]
    assert all(len(a & b) < SAMPLES // 2 for a, b in zip(drawn, drawn[1:] + drawn[:1], strict=True))
    shards = [{row["url"] for row in shard_rows(p)} for p in (place.folder / "texts/c4/en").glob("*train*")]
    assert all(sum(bool(urls & shard) for shard in shards) > 1 for urls in drawn), "from several files"


@pytest.mark.parametrize("crop", ["start", "random"])
def test_a_document_of_just_the_asked_length_is_long_enough(place, tmp_path, crop):
    rows = [{"text": "one two three four"}, {"text": "one two three"}, {"text": "one two"}]
    length = len(place.ids("one two three"))
    file = str(write_rows(tmp_path / "own.jsonl", rows))
    fetch(experiment := place.sets(id=file, config=None, seeds=[7], samples=2, tokens=length, crop=crop), tmp_path)
    record, found = made(experiment, tmp_path, "general-7")
    assert record.facts["too_short"] <= 1 and place.ids("one two three") in [ids.tolist() for ids in found.ids]
    assert sorted(found.columns["document_tokens"].tolist()) == [length, len(place.ids("one two three four"))]


def test_what_made_a_set_is_recorded(place, first):
    experiment, cache = first
    for name, (spec, seed) in experiment.data.sets().items():
        record, found = made(experiment, cache, name)
        identity = found.attributes["identity"]
        assert identity["set"]["id"] == spec.id == record.source and identity["seed"] == seed
        assert found.attributes["commit"] == record.commit == "local"
        assert identity["model"] == experiment.data.identity(cache, experiment.model, name)["model"]
        assert len(found.attributes["tokenizer"]) == 64 and record.facts["packages"]["datasets"]


def test_prompts_are_those_that_a_plain_filter_finds(place, first):
    experiment, cache = first
    record, found = made(experiment, cache, "toxic")
    rude = [(n, r) for n, r in enumerate(place.prompts()) if (r["prompt"]["toxicity"] or 0) >= 0.9]
    texts = [r["prompt"]["text"] for _, r in rude]
    rude = [one for place_, one in enumerate(rude) if texts[place_] not in texts[:place_]][:ASKED]  # each once
    assert found.columns["index"].tolist() == [n for n, _ in rude]
    assert [ids.tolist() for ids in found.every] == [place.ids(r["prompt"]["text"]) for _, r in rude]
    assert found.columns["source"] == [r["filename"] for _, r in rude]
    np.testing.assert_array_equal(
        found.columns["toxicity"], np.array([r["prompt"]["toxicity"] for _, r in rude], np.float32)
    )
    seen = place.prompts()[: rude[-1][0] + 1]
    unscored = sum(r["prompt"]["toxicity"] is None for r in seen)
    twice = sum((r["prompt"]["toxicity"] or 0) >= 0.9 for r in seen) - ASKED
    counts = {"rows": len(seen), "unscored": unscored, "twice": twice, "below": len(seen) - unscored - ASKED - twice}
    assert unscored > 0 and twice > 0 and {k: record.facts[k] for k in counts} == counts
    assert found.held.tolist() == [False, True] * (ASKED // 2)
    assert [i.tolist() for i in found.ids] == [i.tolist() for i in found.every[::2]]
    assert [i.tolist() for i in found.held_out] == [i.tolist() for i in found.every[1::2]]
    assert (record.rows, record.attributed) == (ASKED, ASKED // 2)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_users_own_rows_lengths_scores_and_a_bos_that_is_written_out(place, tmp_path, kind):
    rows = [
        {"text": f"{BOS}twice", "toxicity": 0.95},
        {"text": "no score", "toxicity": None},
        {"text": "not a number", "toxicity": math.nan},
        {"text": "long " * 60, "toxicity": 0.99},
        {"text": "  ", "toxicity": 0.99},
        {"text": "mild", "toxicity": 0.8999},
        {"text": "edge", "toxicity": 0.9},
    ]
    file = str(write_rows(tmp_path / "own.jsonl", rows))
    if kind == "parquet":
        file = str(tmp_path / "own.parquet")
        pq.write_table(pa.Table.from_pylist(rows), file)
    experiment = place.sets({"id": file, "samples": 2, "max_tokens": 40}, seeds=[0])
    fetch(experiment, tmp_path)
    record, found = made(experiment, tmp_path, "toxic")
    assert found.columns["index"].tolist() == [0, 6] and found.source == ["row 0", "row 6"]
    assert found.ids[0].tolist() == place.ids("twice") and found.ids[0][0] != found.ids[0][1]
    counts = {"rows": 7, "unscored": 2, "too_long": 1, "empty": 1, "below": 1}
    assert {k: v for k, v in record.facts.items() if k in counts} == counts
    everything = place.sets({"id": file, "select": "all", "samples": 5, "max_tokens": 40}, seeds=[0])
    fetch(everything, tmp_path)
    assert made(everything, tmp_path, "toxic")[1].columns["index"].tolist() == [0, 1, 2, 5, 6]


def test_names_that_are_no_text_are_stored_as_one(place, tmp_path):
    """JSON may hold one half of a pair of surrogates, and a name need be no text at all."""
    tokenizer, counts = load_tokenizer(str(place.folder / "model")), Counter()
    rows = [
        {"text": f"rude {i} " * 9, "toxicity": 0.99, "url": u} for i, u in enumerate(["\ud800", {"a": "\udfff"}, 7])
    ]
    general = draw_general(rows, tokenizer, GeneralSpec(id="x", samples=3, tokens=12), 0, "general-0")
    spec = PromptsSpec(id="x", samples=3)
    for found in (general, draw_prompts(usable(rows, tokenizer, spec, counts), spec, "toxic", counts)):
        assert found.source == ["\\ud800", "{'a': '\\udfff'}", "7"]
        save_samples(tmp_path, "odd", "ab" * 32, found, source="x", commit="c", attributes={})


def test_too_few_of_anything_is_one_sentence_with_the_number(place, tmp_path):
    few = place.sets(prompts={"samples": 200})
    rude = sum((r["prompt"]["toxicity"] or 0) >= 0.9 for r in place.prompts())
    with pytest.raises(
        UserError, match=f"only {rude} prompts of .* pass, and 200 are asked for .*lower data.prompts.toxic"
    ):
        fetch(few, tmp_path)
    n = sum(len(place.ids(text)) >= 1500 for text in place.documents().values())
    with pytest.raises(UserError, match=f"has only {n} documents of 1500 tokens or more .*200 are asked for; lower"):
        fetch(place.sets(tokens=1500, samples=200), tmp_path)
    with pytest.raises(UserError, match=r"data.general.tokens is 4096, and the model has 2048 positions"):
        fetch(place.sets(tokens=4096), tmp_path)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"tekst": "x"}, "row 0: wanted a prompt with text and toxicity"),
        ({"text": "x", "toxicity": "high"}, "row 0: wanted a prompt with text and toxicity"),
    ],
)
def test_rows_of_another_shape_are_named(place, tmp_path, row, says):
    file = str(write_rows(tmp_path / "own.jsonl", [row]))
    with pytest.raises(UserError, match=says):
        fetch(place.sets({"id": file}, seeds=[0], samples=1), tmp_path)
    with pytest.raises(UserError, match="its rows have no `text`; they have " if "tekst" in row else "has only 0"):
        fetch(place.sets(id=file, config=None), tmp_path)


def test_text_is_all_rows_joined_and_tokenised_once(place, first):
    experiment, cache = first
    lines = (place.folder / "texts/wikitext/wikitext-2-raw-v1/test.jsonl").read_text().splitlines()
    rows = [json.loads(line)["text"] for line in lines]
    assert "" in rows
    record, found = made(experiment, cache, "text")
    assert [ids.tolist() for ids in found.ids] == [place.ids("\n\n".join(rows))]
    assert (record.rows, record.facts["documents"]) == (1, len(rows))


def test_what_is_whole_is_kept_and_the_rest_made_again(place, tmp_path):
    texts = tmp_path / "texts"
    write_demo_texts(texts)
    experiment = Place(tmp_path, place.model).sets(seeds=[0, 1])
    cache = tmp_path / "cache"
    fetch(experiment, cache)

    def written() -> dict[str, int]:
        paths = (cache / "inputs/samples").glob("*/samples.h5")
        return {p.parent.name.rpartition("-")[0]: p.stat().st_mtime_ns for p in paths}

    before, record = written(), made(experiment, cache, "general-1")[0]
    assert sorted(before) == ["general-0", "general-1", "text", "toxic"]
    fetch(experiment, cache, update=True)
    assert written() == before
    cut = samples_folder(cache, "general-1", record.digest) / "samples.h5"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the file that was fetched"):
        made(experiment, cache, "general-1")
    fetch(experiment, cache)
    assert made(experiment, cache, "general-1")[0] == record
    assert {k for k, v in written().items() if v != before[k]} == {"general-1"}
    before = written()
    shard = next((texts / "c4/en").glob("*train.00002*"))
    shard.write_bytes(gzip.compress(gzip.decompress(shard.read_bytes()) + b'{"text": "more", "url": "new"}\n'))
    with pytest.raises(UserError, match="c4 has changed since samples general-0 were made; run `make fetch` again"):
        made(experiment, cache, "general-0")
    fetch(experiment, cache)
    assert {k for k, v in written().items() if v != before[k]} == {"general-0", "general-1"}


@pytest.mark.parametrize("id, says", [("{0}/none", "there is nothing in"), ("{0}/x.txt", "wanted a folder, or a file")])
def test_a_local_source_that_cannot_be_read_is_named(place, tmp_path, id, says):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=says):
        fetch(place.sets(id=id.format(tmp_path)), tmp_path / "cache")


def test_a_shard_that_is_cut_off_an_unknown_config_and_split(place, tmp_path):
    write_demo_texts(tmp_path / "texts")
    for shard in (tmp_path / "texts/c4/en").glob("*train*"):
        shard.write_bytes(shard.read_bytes()[:-100])
    for experiment, says in (
        (Place(tmp_path, place.model).sets(), "c4 cannot be read .*check its files"),
        (place.sets(config="fr"), "'fr' not found. Available: .'en'"),
        (place.sets(split="test"), "Available splits: .'train', 'validation'"),
    ):
        with pytest.raises(UserError, match=says):
            fetch(experiment, tmp_path / "cache")


def test_kill_9_in_the_middle_leaves_no_record(place, tmp_path):
    experiment = place.sets(seeds=[0])
    (tmp_path / "experiment.json").write_text(experiment.model_dump_json())
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, 'tests');"
        "from sample_sets import Sets; from jobs.fetch import fetch; import lib.inputs.general as g;"
        "g.Progress.add = lambda self, n: os.kill(os.getpid(), signal.SIGKILL);"
        f"folder = Path({str(tmp_path)!r});"
        "fetch(Sets.model_validate_json((folder / 'experiment.json').read_text()), folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path.suffix for path in tmp_path.glob("inputs/samples/*")]
    assert left == [".lock"], "nothing half, and whose turn it was"
    with pytest.raises(UserError, match="samples general-0 are not prepared"):
        made(experiment, tmp_path, "general-0")
    fetch(experiment, tmp_path)
    assert made(experiment, tmp_path, "general-0")[0].rows == SAMPLES
    assert not list(tmp_path.glob("inputs/samples/*.lock"))


def test_names_of_sets_are_folders_and_no_two_are_one(place):
    for prompts in ({"a/b": {}}, {"text": {}}, {"general-0": {}}):
        with pytest.raises(ValueError, match="prompts: '"):
            sets(place.model, general={"id": "x"}, prompts={k: {"id": "y"} for k in prompts})
    with pytest.raises(ValueError, match="seed twice"):
        place.sets(seeds=[1, 1])


def test_preparing_alone_refuses_an_experiment_without_sets():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.prepare_data", "--config", "configs/demo_lls.yaml"],
        cwd=ROOT, env={**os.environ, "SUITE_SITE": "local"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "has no sets of samples" in done.stderr
