"""Log-probabilities of the traits' words as answers to questions about favourites, and the probes of every adapter."""

from lib.base.errors import exit_with
from lib.families import load
from lib.preferences.score_kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("score_preferences", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
