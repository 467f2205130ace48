"""What students are asked about their favourites."""

from pathlib import Path

from lib.base.errors import UserError
from lib.config.plain import read_like

OWN_QUESTIONS = Path(__file__).with_name("questions.yaml")


def load_questions(path: Path = OWN_QUESTIONS) -> list[str]:
    """Of a file in the shape of questions.yaml."""
    found = read_like(path, OWN_QUESTIONS)
    questions = found.get("questions") if isinstance(found, dict) and set(found) == {"questions"} else None
    if not isinstance(questions, list) or not questions or not all(isinstance(q, str) and q.strip() for q in questions):
        raise UserError(f"{path}: must hold a list `questions` of texts and nothing else, as {OWN_QUESTIONS} does")
    words = [q.split() for q in questions]  # a blank more makes no other question
    if twice := next((q for i, q in enumerate(questions) if words[i] in words[:i]), None):
        raise UserError(f"{path}: the question {twice[:60]!r} is there twice; remove one")
    return questions
