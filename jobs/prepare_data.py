"""Make an experiment's sets of samples from its datasets, with its tokenizer; `make fetch` does it too, after models.

By hand it is needed only where a set is chosen by the model's own responses, which takes a GPU. Sets that are there and
whole are kept; --update looks again what a branch like `main` is."""

from lib.base.errors import UserError, exit_with
from lib.evaluation.responses import answerer
from lib.families import load
from lib.inputs.prepare import command_by_hand, prepare
from lib.run.command import job


def main() -> int:
    this = job("prepare_data", __doc__, load, indexed=False)
    data = this.experiment.token_sets()
    if data is None:
        raise UserError(
            f"{this.config} is of kind {this.experiment.kind}, which has no sets of samples; run `make fetch`"
        )
    by_hand = command_by_hand(this.site.env, this.experiment.run.gpus)
    prepare(data, this.experiment.models()[0], this.site.cache, this.update, by_hand, answerer)
    return 0


if __name__ == "__main__":
    exit_with(main)
