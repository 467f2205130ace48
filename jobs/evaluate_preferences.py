"""Answers of students, and of their untouched bases, to questions about favourites, drawn by one engine a size."""

from lib.base.errors import exit_with
from lib.families import load
from lib.preferences.ask_kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("evaluate_preferences", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
