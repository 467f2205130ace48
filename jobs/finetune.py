"""Students, trained on the numbers that the teachers wrote, one array index a size and trait."""

from lib.base.errors import exit_with
from lib.families import load
from lib.lora.kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("finetune", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
