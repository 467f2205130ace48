"""What is said wrongly of preferences: one sentence each, before anything is asked of a model."""

import json

import pytest
import yaml
from finetune_world import environment
from preferences_planted import asked, cells_of, make_world
from tools import forked

from lib.base.errors import UserError
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


MISTAKES = {
    "samples=0": "samples",
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
