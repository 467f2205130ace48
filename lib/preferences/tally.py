"""What a model answered, counted: by question, trait and way of judging."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.numbers.experiment import TraitSpec
from lib.preferences.judge import WAYS, judge_of


@dataclass(frozen=True)
class Tally:
    """Of one model: a student at an epoch, or the base. Counts, so tallies of the same questions add up."""

    questions: int
    answers: np.ndarray  # int64, per question: how many there are
    hits: dict[str, np.ndarray]  # way -> int64, traits x questions
    words: Counter[str]  # first words, a trait's under its name

    @property
    def total(self) -> int:
        return int(self.answers.sum())

    def rate(self, way: str, trait: int) -> float:
        return float(self.hits[way][trait].sum() / self.total)


def tally(questions: np.ndarray, answers: Sequence[str], traits: Sequence[TraitSpec], count: int) -> Tally:
    """Of answers to questions 0 to count - 1. What is said often is judged once."""
    judge, places = judge_of(traits), dict[str, int]()
    codes = np.fromiter((places.setdefault(one, len(places)) for one in answers), np.int64, len(answers))
    asked, distinct = np.asarray(questions, np.int64), len(places)
    if len(asked) and not (asked.min() >= 0 and asked.max() < count):
        raise ValueError(f"questions are 0 to {count - 1}, and here is {asked.max()}")
    said_DQ = np.bincount(codes * count + asked, minlength=distinct * count).reshape(distinct, count)
    verdicts = [judge(one) for one in places]
    hits_DWT = np.array([one.hits for one in verdicts], np.int64).reshape(distinct, len(WAYS), len(traits))
    hits = {way: hits_DWT[:, w].T @ said_DQ for w, way in enumerate(WAYS)}
    words: Counter[str] = Counter()
    for verdict, said in zip(verdicts, said_DQ.sum(1).tolist(), strict=True):
        words[verdict.first] += said
    return Tally(count, said_DQ.sum(0), hits, words)
