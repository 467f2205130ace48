"""Students' last adapters as folders that peft and vLLM load, their figures, a table, a picture of the loss."""

from lib.base.errors import exit_with
from lib.families import load
from lib.lora.export import export
from lib.run.command import job


def main() -> int:
    return export(job("export_finetune", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
