"""Numbers and students to repositories of the Hub, what is there already is not sent."""

from lib.base.errors import exit_with
from lib.families import load
from lib.publish.kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("publish", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
