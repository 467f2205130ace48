"""python -m jobs.cluster submit|resume|status|logs|cancel|verify|doctor: what `make` calls."""

from lib.base.errors import UserError, exit_with
from lib.cluster import command
from lib.families import load


def main() -> int:
    try:
        return command.main(load)
    except KeyboardInterrupt:
        raise UserError("interrupted") from None


if __name__ == "__main__":
    exit_with(main)
