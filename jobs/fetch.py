"""Bring an experiment's models, tokenizers and datasets to the cache, at pinned revisions; make its sample sets.

Run it where there is a network (a login node, a CPU job). Jobs then read only what is recorded here, offline. A branch
like `main` is resolved once: later calls keep that commit until UPDATE=1 is given."""

from lib.base.errors import exit_with
from lib.evaluation.responses import answerer
from lib.evaluation.tasks import bring
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.prepare import command_by_hand
from lib.run.command import job


def main() -> int:
    this = job("fetch", __doc__, load, indexed=False)
    by_hand = command_by_hand(this.site.env, this.experiment.run.gpus)
    fetch(this.experiment, this.site.cache, this.update, by_hand, answerer)
    names, own = this.experiment.tasks()
    if names:
        bring(names, own, this.update)
    return 0


if __name__ == "__main__":
    exit_with(main)
