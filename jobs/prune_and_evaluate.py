"""What the model does without the first neurons of each ranking, one array index a ranking."""

from lib.base.errors import exit_with
from lib.families import load
from lib.pruning.kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("prune_and_evaluate", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
