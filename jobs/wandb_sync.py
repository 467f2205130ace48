"""Send what students on compute nodes kept for Weights & Biases."""

from lib.base.errors import exit_with
from lib.families import load
from lib.lora.sync import sync
from lib.run.command import job


def main() -> int:
    return sync(job("wandb_sync", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
