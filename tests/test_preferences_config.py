"""What is said wrongly of preferences: one sentence each, before anything is asked of a model."""

import json
from dataclasses import replace

import pytest
import yaml
from finetune_world import environment
from preferences_planted import asked, cells_of, make_world
from tools import forked

from lib.base.errors import UserError
from lib.bench.shapes import SHAPES
from lib.families import load
from lib.preferences.runs import neutral_of

OWL = {"name": "owl", "words": []}  # taught, and never named


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("config"))


def with_traits(folder, tmp_path, *traits):
    """The same configurations over other traits."""
    for name in ("finetune", "words", "asked"):
        (tmp_path / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text())
    numbers = json.loads((folder / "numbers.yaml").read_text())
    (tmp_path / "numbers.yaml").write_text(json.dumps(numbers | {"traits": list(traits)}))
    return tmp_path / "asked.yaml"


def test_the_neutral_student_is_of_a_teacher_that_was_given_nothing(world, tmp_path):
    assert neutral_of(asked(world)) == "neutral"
    assert neutral_of(load(with_traits(world, tmp_path, OWL, "cat", "neutral"))) == "neutral"
    assert neutral_of(load(with_traits(world, tmp_path, OWL, "cat"))) is None
    plain = {"name": "plain", "system_prompt": None, "words": []}
    assert neutral_of(load(with_traits(world, tmp_path, "cat", plain))) == "plain"


def test_traits_that_no_answer_can_name_are_refused(world, tmp_path):
    config = with_traits(world, tmp_path, OWL, "neutral")
    for name, job in (("asked", "evaluate_preferences"), ("words", "score_preferences")):
        words = ("--config", str(config.with_stem(name)), "--index", "0")
        done = forked(f"jobs.{job}", *words, env=environment(world))
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "no trait of teachers has `words`" in done.stderr


@pytest.mark.parametrize(("size", "gpu", "gib", "rate"), [("7b", "h100", 14.2, 1527), ("72b", "h200", 135.4, 393)])
def test_what_answers_are_said_to_take_is_what_was_measured(world, monkeypatch, size, gpu, gib, rate):
    """7B by two engines on an H100, 72B by one on two H200s."""
    monkeypatch.setenv("SUITE_GPU", gpu)
    experiment, cache, shape = asked(world, "run.gpus=1"), world / "cache", SHAPES[size]
    cell, source = next(iter(cells_of(world).values())), experiment.source.source
    real = source.model_in(cache, experiment.load_of(cell))
    body, head = shape.layers * shape.layer_parameters, shape.vocabulary * shape.hidden
    sized = replace(real, bytes=int(gib * 2**30), body_parameters=body, head_parameters=head)
    monkeypatch.setattr(type(source), "model_in", lambda *_: sized)
    assert experiment.estimate(cache, cell, gpu).seconds == pytest.approx(cell.total / rate, rel=0.08)


MISTAKES = {
    "per_question=0": "per_question",
    "epochs=[4]": "4 is more than the students' 3",
    "epochs=[0]": "epochs",
    "epochs=[2, 1]": "must rise",
    "epochs=[]": "must rise",
    "epochs=best": "epochs",
    "template=none": "its template must be those of",
    "judge=last": "judge",
    "first_questions=51": "holds 50",
    "first_questions=0": "first_questions",
    "questions=nowhere.yaml": "there is no file",
    "questions=.": "there is no file",
    "generate.max_tokens=0": "max_tokens",
    "generate.batch=0": "batch",
    "students.config=numbers.yaml": "kind",
    "logprobs.config=asked.yaml": "kind",
    "logprobs.set=['epochs=last']": "leaves out \\[1, 2\\]",
    "logprobs.set=['first_questions=11']": "its questions must be those of",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_are_one_sentence(world, change):
    with pytest.raises(UserError, match=MISTAKES[change]) as caught:
        cells_of(world, change)
    assert "\n" not in str(caught.value).strip() and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("questions", "says"),
    [
        (None, "must hold a list `questions`"),
        ({"questions": []}, "must hold a list `questions`"),
        ({"questions": ["Which?", " "]}, "must hold a list `questions`"),
        ({"questions": ["Which?", "Which?"]}, "'Which\\?' is there twice"),
        ({"questions": ["Which?", "Which? "]}, "'Which\\? ' is there twice"),
    ],
)
def test_questions_of_ones_own_are_looked_at(world, questions, says):
    (world / "mine.yaml").write_text("" if questions is None else yaml.safe_dump(questions))
    with pytest.raises(UserError, match=says):
        cells_of(world, "questions=mine.yaml", "first_questions=null")
