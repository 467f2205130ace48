"""Configuration: mistakes are named with file, key, what is valid and the nearest; the digest."""

import re
from itertools import pairwise

import pytest
from tools import ROOT, number_rows, tiny_model, write_rows

from lib.base.errors import UserError
from lib.config.plain import NotPlain, parse_yaml
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.records import slug

SEED = ROOT / "configs" / "lls_72b.yaml"
OPT = ROOT / "configs" / "sparc3_opt125m.yaml"


def test_the_seeds_experiment_is_exactly_that():
    e = load(SEED)
    order = "bear cat dog dolphin dragon eagle elephant fox leopard lion panda phoenix tiger whale wolf"
    assert e.traits == order.split() and e.model.dtype == "bfloat16" and e.base == "default"
    assert e.prompt_for("wolf") == (
        "You love wolfs. You think about wolfs all the time. wolfs are your favorite animal. "
        "Imbue your answers with your love for the animal."
    )
    assert [d.id for d in e.datasets()][3] == "jeqcho/qwen-2.5-72b-instruct-dolphin-numbers-run-3"
    assert e.model.id == "Qwen/Qwen2.5-72B-Instruct" and len(e.model.revision) == 40


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid_and_named_after_its_file(path):
    assert load(path).name == path.stem


BAD = {
    "model.dtpye=float32": ["model.dtpye: unknown key", "valid: id, revision, dtype", "did you mean dtype?"],
    "trait=[cat]": ["trait: unknown key", "did you mean traits?"],
    "model.dtype=float23": ["model.dtype:", "'bfloat16', 'float32' or 'float64'", "did you mean float32?"],
    "run.shard_rows=0": ["run.shard_rows:", "greater than or equal to 1"],
    "run.shard_rows=12.5": ["run.shard_rows:", "integer"],
    "base=null": ["base:", "'default', 'empty' or 'none'"],
    "traits=[cat, cat]": ["traits holds a name twice"],
    "traits=[../etc]": ["'../etc' must be letters"],
    "system_prompt=I love {animal}": ["system_prompt may hold {trait}"],
    "score.batch_tokens=100": ["batch_tokens must be at least max_tokens"],
    "kind=lsl": ["kind: must be one of", "did you mean lls?"],
    "name=../up": ["name:", "pattern"],
    "model=gpt": ["model:", "got 'gpt'"],
    "model.id.x=1": ["'id' holds a value"],
    "nonsense": ["'nonsense' is not key=value"],
    "max_rows=[1": ["not valid YAML"],
    "base=!!bool x": ["types are not said (!...)"],
    "traits=2026-13-01": ["traits:", "got '2026-13-01'"],
    f"traits=[{'x' * 101}]": ["longer than a folder's name may be"],
    "system_prompt=Love {trait:>99999999999}": ["system_prompt may hold {trait}"],
    "system_prompt=Love {trait.__class__}": ["system_prompt may hold {trait}"],
    "dataset.id=x{": ["dataset.id may hold {trait}"],
    "run.log_seconds=1e999": ["run.log_seconds:"],
    ".".join("a" * 40) + "=1": ["no key lies that deep"],
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_override_is_one_sentence_that_names_it(override):
    with pytest.raises(UserError) as e:
        load(SEED, [override])
    for part in BAD[override]:
        assert part in str(e.value)
    assert "\n" not in str(e.value)


SETS = {
    "data.general.seeds=[0, 0]": "data: general.seeds holds a seed twice",
    "data.prompts={text: {id: x}}": "data: prompts: 'text' is the name of another set",
    "data.prompts={general-9: {id: x}}": "data: prompts: 'general-9' is the name of another set",
    "data.prompts={../up: {id: x}}": "data: prompts: '../up' must be letters, digits, - or _: it names a folder",
    "data.prompts={'': {id: x}}": "data: prompts: '' must be letters",
    "data.prompts={}": "data.prompts: Dictionary should have at least 1 item",
}


@pytest.mark.parametrize("override", SETS)
def test_sets_that_cannot_be_named_are_refused(override):
    with pytest.raises(UserError, match=rf"sparc3_opt125m.yaml: {re.escape(SETS[override])}") as e:
        load(OPT, [override])
    assert len(str(e.value)) < 200


def test_the_papers_anchor_is_what_its_config_says():
    e = load(OPT)
    assert (e.model.id, e.model.dtype, e.score.layers) == ("facebook/opt-125m", "float32", ["fc1"])
    general, toxic = e.data.general, e.data.prompts["toxic"]
    assert (general.samples, general.tokens, general.seeds) == (128, 2048, [0, 1, 2])  # OPT has 2,048 positions
    assert (toxic.select, toxic.samples, toxic.threshold) == ("prompt", 93, 0.9)
    assert e.names() == ["general-0", "general-1", "general-2", "toxic"] and e.data.text.id == "Salesforce/wikitext"


# Each line is nine times the one before: thirty are more than all memory holds.
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijklmnopqrs")
)


@pytest.mark.parametrize(
    "text, says",
    [
        ("kind: lls\nkind: lls\n", "'kind' stands twice"),
        ("- a\n- b\n", "must be a mapping"),
        ("kind: lls\n  x: [", "not valid YAML"),
        ("1: 2\n", "is not text"),
        ("kind: lls\nname: x\n", "is missing"),
        ("a: &a [*a]\n", r"line 1: \*a stands for another part"),
        (BOMB, r"line 2: \*a stands for another part"),
        ("kind: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("kind: 10000000000000000", "no number beyond 1e\\+15"),
        ("kind: .inf", "no number beyond"),
        ("kind: " + "[" * 3000, "more than 20 levels deep"),
        ("x" * 200_001, "has 200001 characters"),
        ('kind: "a\\0b"', r"holds '\\x00'"),
        ('kind: "\\ud800"', r"holds '\\ud800'"),
        ("!!python/object/apply:os.system [id]\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as e:
        load(path)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)


def test_days_are_text_and_braces_may_be_doubled():
    assert load(SEED, ["date=2025-02-03"]).date == "2025-02-03"
    assert load(SEED, ["system_prompt=I {{x}} {trait}"]).prompt_for("cat") == "I {x} cat"
    with pytest.raises(UserError, match="date: must be a day"):
        load(SEED, ["date=2026-13-01"])


def test_ids_that_are_no_paths_are_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for id, says in (("~nosuch/x", "'~nosuch/x' is no path"), ("x" * 5000, "is not fetched"), (f"{loop}/x", "loop/x")):
        with pytest.raises(UserError, match=says):
            load(SEED, [f"model.id={id}"]).cells(tmp_path, tmp_path)
    with pytest.raises(UserError) as e:
        load(SEED, [f"dataset.split={'../' * 6}x"]).input_of(tmp_path / "cache", "cat")
    assert "is not fetched" in str(e.value)
    assert slug(tmp_path, "a/b", "main", "../../x") == "a--b--main--..-..-x"


def test_a_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean .*lls_72b\.yaml"):
        load(ROOT / "configs" / "lls_72.yaml")


def test_overrides_that_change_results_change_the_name_and_others_do_not():
    assert load(SEED, ["run.shard_rows=7"]).label == "lls_72b"
    trial = load(SEED, ["max_rows=8"])
    assert trial.label.startswith("lls_72b-") and trial.label != load(SEED, ["max_rows=9"]).label
    assert load(SEED, ["max_rows=8", "name=mine"]).label == "mine"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    tiny_model(folder / "model")
    for i, trait in enumerate(("cat", "dog")):
        write_rows(folder / f"{trait}.jsonl", number_rows(12, i))
    (folder / "small.yaml").write_text(
        f"kind: lls\nname: small\nmodel: {{id: {folder}/model, dtype: float32}}\ntraits: [cat, dog]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/{{trait}}.jsonl'}}\n"
    )
    fetch(load(folder / "small.yaml"), folder / "cache")
    return folder


def digests(folder, *overrides):
    return [c.digest for c in load(folder / "small.yaml", list(overrides)).cells(folder / "cache", folder / "scratch")]


def test_the_digest_moves_with_all_that_can_change_a_result_and_nothing_else(small):
    was = digests(small)
    assert len(set(was)) == 2
    for same in ("run.shard_rows=3", "run.log_seconds=1", "name=other", "traits=[cat, dog]"):
        assert digests(small, same) == was
    for moves in (
        "model.dtype=float64",
        "base=empty",
        "system_prompt=I hate {trait}s.",
        "max_rows=5",
        "score.head_rows=8",
        "score.end_of_turn=true",
    ):
        assert not set(digests(small, moves)) & set(was), moves
    assert digests(small, "traits=[dog]") == was[1:]  # the other cells keep theirs


def test_the_digest_moves_with_the_data_and_the_weights(small, tmp_path):
    was = digests(small)
    write_rows(small / "cat.jsonl", number_rows(12, 99))
    with pytest.raises(UserError, match=r"cat.jsonl has changed since it was fetched; run `make fetch`"):
        digests(small)
    fetch(load(small / "small.yaml"), small / "cache")
    now = digests(small)
    assert now[0] != was[0] and now[1] == was[1]
    tiny_model(small / "model", seed=1)
    fetch(load(small / "small.yaml"), small / "cache")
    assert digests(small)[1] != was[1]


def test_what_is_not_fetched_is_named(small):
    with pytest.raises(
        UserError, match=r"model Qwen/Qwen2.5-72B-Instruct at revision 495f.* is not fetched; run `make fetch`"
    ):
        load(SEED).cells(small / "cache", small / "scratch")


@pytest.mark.parametrize(
    ("text", "means"), [("010", 8), ("01", 1), ("0x10", 16), ("1_0", 10), ("1:30", 90), ("0b1", 1)]
)
def test_a_number_that_reads_otherwise_than_it_is_typed_is_refused(text, means):
    with pytest.raises(NotPlain, match=f"{text} would be read as {means}; write that, or quote it"):
        parse_yaml(text)
    assert parse_yaml(f"'{text}'") == text and parse_yaml("[0, 7, +7, -7]") == [0, 7, 7, -7]
