"""What the demo's students took from their teachers' numbers, with an interval."""

from lib.base.errors import exit_with
from lib.demo.students import show
from lib.families import load
from lib.run.command import job


def main() -> int:
    return show(job("demo_students", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
