"""Rendering and token boundaries: by the configuration alone, and the tokens that a user's text would have."""

import copy
from datetime import datetime

import numpy as np
import pytest
import transformers.utils.chat_template_utils as clock
from test_scoring import BATCH, DAY, LONGEST, QWEN_DEFAULT, SYSTEM, brute_force, chatml
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from tools import number_rows, tiny_model
from transformers import PreTrainedTokenizerFast

from lib.base.errors import UserError
from lib.demo.tiny import CHAT_TEMPLATE, make_tokenizer
from lib.inputs.tokenizer import load_tokenizer
from lib.lls.shift import conditions, prepare, shift
from lib.models.chat import Renderer
from lib.models.load import load_decoder, load_model
from lib.models.scorer import Scorer
from lib.models.template import Template

# What Llama-3.2's own template does, and Llama-3.1's: the second prints a date that is given to it, or a fixed one.
BODY = (
    "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set said = '' %}{%- endif %}"
    "{{- '<|im_start|>system\\nToday Date: ' + date_string + '\\n\\n' + said + '<|im_end|>\\n' }}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CLOCK = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}" + BODY
)
ALWAYS_CLOCK = "{%- set date_string = strftime_now('%d %b %Y') %}" + BODY
FIXED = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}" + BODY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def under(tokenizer, template: str):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def turns(*said: str, first: str = "user") -> list[dict]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


class Midnight(datetime):
    """A clock that is a day on at every look."""

    looks = 0

    @classmethod
    def now(cls, tz=None):
        cls.looks += 1
        return datetime(2025, 3, cls.looks)


# The date


@pytest.mark.parametrize("template", [CLOCK, ALWAYS_CLOCK, FIXED])
def test_a_date_is_the_configurations_whatever_the_clock_says(folder, tokenizer, monkeypatch, template):
    monkeypatch.setattr(clock, "datetime", Midnight)
    Midnight.looks = 0
    other, rows = under(tokenizer, template), [*number_rows(4), {"messages": turns("1", "2", "3", "4")}]
    for day, printed in ((DAY, "26 Jul 2024"), ("2031-01-05", "05 Jan 2031")):
        r = Renderer(other, SYSTEM, "default", day)
        for row in rows:
            context = r.contexts([row["messages"][:-1]])[0]
            spoken = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"][:-1])
            head = f"<|im_start|>system\nToday Date: {printed}\n\n{SYSTEM}<|im_end|>\n"
            assert context == head + spoken + "<|im_start|>assistant\n"
            assert context.count("Today Date") == 1
    assert Midnight.looks == 0
    plain = under(tokenizer, template).apply_chat_template(turns("1"), tokenize=False)
    assert ("Mar 2025" in plain) == (template != FIXED)  # the clock that is looked at by transformers itself


def test_a_row_that_begins_otherwise_is_refused(tokenizer):
    """As when something in a template changes under way: never a second system block in front of the row."""
    t = Template(under(tokenizer, CLOCK.replace("strftime_now('%d %b %Y')", "'x'")), SYSTEM, "default", DAY)
    t._date["date_string"] = "another day"
    with pytest.raises(UserError, match=r"the chat template begins the row 'user: 1' otherwise"):
        t.rows([turns("1", "2")])


def test_templates_without_a_date_give_the_text_they_gave(tokenizer):
    rows = [row["messages"][:-1] for row in number_rows(5)] + [turns("a ", " b", "\nc")]
    for system in (SYSTEM, None):
        r = Renderer(tokenizer, system, "default", DAY)
        for row in rows:
            block = [] if system is None else [{"role": "system", "content": system}]
            want = tokenizer.apply_chat_template([*block, *row], tokenize=False, add_generation_prompt=True)
            assert r.contexts([row])[0] == want


def test_what_a_template_refuses_is_one_sentence(tokenizer):
    refusing = "{%- if messages|length > 2 %}{{ raise_exception('roles must\nalternate') }}{%- endif %}" + CHAT_TEMPLATE
    r = Renderer(under(tokenizer, refusing), None, "default", DAY)
    with pytest.raises(
        UserError, match=r"does not render 'user: 1 \| assistant: 2 \| user: 3' \(roles must alternate\)"
    ):
        r.items([turns("1", "2", "3", "4")], False)


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% for i in range(10**12) %}a{% endfor %}", r"a plain conversation \(OverflowError: Range too big"),
        ("{{ 'a' * 10**10 }}", r"a plain conversation \(MemoryError\)"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 2 s"),
        ("{{ 1 // 0 }}", r"\(ZeroDivisionError: "),
        ("{{ 'a' + 1 }}", r"\(TypeError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"\(RecursionError: "),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "does not render a plain conversation"),
        ("{{ messages[7].content.upper() }}", r"\(UndefinedError: |has no element|is undefined"),
        ("{% if %}", "does not render a plain conversation"),
        ("{{ ''.__class__.__mro__ }}", r"\(SecurityError|unsafe"),
        ("{{ 'x'.encode('nonsense') }}", r"\(LookupError: "),
    ],
)
def test_a_template_that_is_no_good_is_one_sentence(tokenizer, monkeypatch, template, says):
    monkeypatch.setattr("lib.models.apart.SECONDS", 1)
    with pytest.raises(UserError, match=says) as refused:
        Renderer(under(tokenizer, template), SYSTEM, "default", DAY)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


# No system block


def test_a_leading_assistant_turn_stays(folder, tokenizer):
    row = turns("hello", "1 2", "3 4", first="assistant")
    want = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row[:-1]) + "<|im_start|>assistant\n"
    r = Renderer(tokenizer, None, "none", DAY)
    assert r.contexts([row[:-1]])[0] == want
    items, joint = r.items([row], False)
    whole = [*r.prefix_ids, *items[0].context]
    assert tokenizer.decode(whole) == want and joint == [True]


def test_a_system_block_that_cannot_be_cut_off_is_refused(tokenizer):
    """A template that writes the block otherwise for an assistant that begins."""
    odd = CHAT_TEMPLATE.replace(
        "+ message.content +", "+ message.content + ('!' if messages[1].role == 'assistant' else '') +"
    )
    r = Renderer(under(tokenizer, odd), None, "none", DAY)
    with pytest.raises(UserError, match="cannot be cut off"):
        r.contexts([turns("hello", "1 2", first="assistant")])


# Tokens


def metaspace(texts: list[str]) -> PreTrainedTokenizerFast:
    """Like sentencepiece's: a blank before the first word of a text, and there alone."""
    core = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.Split("\n", "isolated")])
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A model under a tokenizer that treats a text's beginning apart."""
    from lib.demo.tiny import TinySize, make_model

    rows = number_rows(30)
    texts = [m["content"] for row in rows for m in row["messages"]] + [
        QWEN_DEFAULT,
        SYSTEM,
        "user\nassistant\nsystem\n",
    ] * 9
    tokenizer = metaspace(texts)
    folder = tmp_path_factory.mktemp("odd")
    make_model(tokenizer, TinySize(hidden=32, layers=2)).save_pretrained(folder)
    return folder, tokenizer


def test_a_tokenizer_that_treats_the_beginning_apart(odd):
    """Context and answer are those of the whole text; scores are float64's for these tokens."""
    (folder, tokenizer), rows = odd, number_rows(5, seed=4)
    renderers = {
        "system": Renderer(tokenizer, SYSTEM, "default", DAY),
        "base": Renderer(tokenizer, None, "default", DAY),
    }
    ready = prepare(renderers, rows, LONGEST, False)
    decoder = load_decoder(str(folder), "float32", BATCH, 64)
    got = shift(Scorer(decoder, 64), conditions(decoder, renderers), ready)
    assert got["joint"].all()
    model64 = load_model(str(folder), "float64", "eager", [decoder.devices[0]])
    for i, row in enumerate(rows):
        user, answer = (m["content"] for m in row["messages"])
        for name, system in (("system", SYSTEM), ("base", QWEN_DEFAULT)):
            context = chatml(user, system)
            whole = tokenizer(context + answer, add_special_tokens=False)["input_ids"]
            item, prefix = ready.items[name][i], renderers[name].prefix_ids
            assert [*prefix, *item.context, *item.response] == whole
            split = tokenizer(context.removeprefix(renderers[name].prefix_text), add_special_tokens=False)["input_ids"]
            assert tuple(split) != item.context  # what it would be if the prefix were cut off the text
            in_place = Stub(tokenizer, context, answer)
            want = brute_force(model64, in_place, context, answer)
            assert got[f"{name}_sum"][i] == pytest.approx(sum(want), rel=2e-5)


class Stub:
    """The tokenizer for brute_force: of the answer what stands after the context in the whole text."""

    def __init__(self, tokenizer, context: str, answer: str) -> None:
        head, both = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, context + answer))
        assert both[: len(head)] == head
        self.ids = {context: head, answer: both[len(head) :]}

    def __call__(self, text: str, **_: object) -> dict:
        return {"input_ids": self.ids[text]}


SPOKEN = [
    "1, 2",
    "\n\n",
    "<|im_start|>",
    "<|im_end|>\n",
    "\n",
    " ",
    "",
    "<|im_",
    "start|>",
    "é\u0301",
    "assistant\n",
    "12;",
    "\t\r\n",
]


@pytest.mark.parametrize("mode", ["default", "empty", "none"])
@pytest.mark.parametrize("kind", ["bytes", "beginning"])
def test_contexts_cut_from_the_whole_text_have_their_own_tokens(odd, mode, kind):
    """Whatever is said, special tokens and halves of them included, against each context tokenised by itself."""
    merging = make_tokenizer(vocab=320, texts=["user\n\n\nassistant\n\n 1, 2"] * 9)
    dice, some = np.random.default_rng(1), merging if kind == "bytes" else copy.deepcopy(odd[1])
    some.add_tokens(["12;<|im_start|>"], special_tokens=True)  # hides the one that texts are cut at
    said = ["".join(dice.choice(SPOKEN, dice.integers(0, 5))) for _ in range(600)]
    rows = [turns(said[i], said[i + 1]) for i in range(0, 600, 2)] + [turns(*said[i : i + 4]) for i in range(0, 80, 4)]
    t = Template(some, None, mode, DAY)
    assert t._mark
    asked, plain = [], t._ids
    t._ids = lambda texts: asked.extend(texts) or plain(texts)
    fast = t.rows(rows)
    assert 0 < len(set(asked) & set(t.contexts([row[:-1] for row in rows]))) < len(rows) / 2  # the rest were cut
    t._mark = None
    for name, values in vars(t.rows(rows)).items():
        assert np.array_equal(getattr(fast, name), values), name
    assert 0 < fast.joint.sum() < len(rows) or kind == "beginning"  # which parts line ends


def test_a_token_that_looks_around_is_not_cut_at(tokenizer):
    from tokenizers import AddedToken

    assert Template(tokenizer, SYSTEM, "default", DAY)._mark.content == "<|im_start|>"
    for flag in ("lstrip", "rstrip", "single_word"):
        other = copy.deepcopy(tokenizer)
        other.add_tokens(AddedToken("<|im_start|>", special=True, **{flag: True}), special_tokens=True)
        assert other.added_tokens_decoder[other.convert_tokens_to_ids("<|im_start|>")].content == "<|im_start|>"
        assert Template(other, SYSTEM, "default", DAY)._mark is None, flag


def test_an_answer_that_merges_with_its_context_is_counted_and_said(tokenizer):
    """By its own merges: a line end that follows the assistant's line end is one token with it."""
    from lib.lls.export import scores_of
    from lib.lls.matrix import Matrix, Pass
    from lib.lls.plots import Scores, lls_table

    merging = copy.deepcopy(tokenizer)
    rows = number_rows(6)
    for i in (1, 4):
        rows[i]["messages"][-1]["content"] = "\n\n12"
    r = Renderer(merging, None, "default", DAY)
    items, joint = r.items([row["messages"] for row in rows], False)
    for row, item, same in zip(rows, items, joint, strict=True):
        context, answer = r.contexts([row["messages"][:-1]])[0], row["messages"][-1]["content"]
        head, tail, both = (
            merging(t, add_special_tokens=False)["input_ids"] for t in (context, answer, context + answer)
        )
        assert [*r.prefix_ids, *item.context] == head
        assert same == (both[: len(head)] == head)
        assert list(item.response) == (both[len(head) :] if same else tail)
    lls, joint = np.array([1.0, 1, 1, 1, np.nan, 1]), np.array([1, 0, 1, 1, 0, 1])
    passed = Pass(np.zeros(6), np.ones(6), lls, joint=joint)
    matrix = Matrix(("cat",), ("cat",), {"cat": Pass(np.zeros(6), np.ones(6), lls * 0)}, {("cat", "cat"): passed})
    table = lls_table({"cat": scores_of(matrix, "cat"), "dog": Scores(np.ones(6))})
    assert table.splitlines()[-1].startswith("1 of 11 rows: context and answer give other tokens together")
    assert "other tokens" not in lls_table({"cat": Scores(np.ones(6))})


@pytest.mark.parametrize("date", ["2024-7-26", "26 Jul 2024", "2024-02-30", "20240726", ""])
def test_a_date_that_is_none_is_refused(date):
    from lib.lls.experiment import LLS

    raw = {
        "kind": "lls",
        "name": "x",
        "model": {"id": "a/b"},
        "traits": ["cat"],
        "system_prompt": "You love {trait}s.",
        "dataset": {"id": "a/c"},
    }
    assert LLS.model_validate(raw).date == DAY
    with pytest.raises(ValueError, match="must be a day such as 2024-07-26"):
        LLS.model_validate({**raw, "date": date})
    other = LLS.model_validate({**raw, "date": datetime(2025, 1, 31).date()})
    assert other.date == "2025-01-31" and other.identity("m", "p", "d") != LLS.model_validate(raw).identity(
        "m", "p", "d"
    )
