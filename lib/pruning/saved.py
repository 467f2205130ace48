"""A model without the first neurons of a ranking, as a folder that loads anywhere:

<output root>/<sweep>/models/<ranking>-<neurons>[-removed]/"""

from lib.base.errors import UserError, nearest
from lib.inputs.records import model_input
from lib.pruning.checkpoint import save_pruned
from lib.pruning.kernel import first, ranked
from lib.pruning.looks import DENSE
from lib.pruning.sweep import Sweep
from lib.run.command import Job
from lib.run.parents import why_blocked


def save(this: Job, ranking: str, neurons: int, remove: bool) -> int:
    experiment = this.of(Sweep)
    cells = {cell.name: cell for cell in this.cells() if cell.name != DENSE}
    if ranking not in cells:
        raise UserError(f"RANKING={ranking!r} is none of {', '.join(cells)}{nearest(ranking, list(cells))}")
    if not 1 <= neurons <= experiment.choice.neurons:
        raise UserError(f"NEURONS={neurons}: the selection has 1 to {experiment.choice.neurons}")
    if why := why_blocked(cells[ranking]):
        raise UserError(f"{why}; `make submit-sparc3` brings it there")
    chosen = first(ranked(experiment, this.site.cache, cells[ranking]), neurons, experiment.choice.scope)
    name = f"{ranking}-{neurons}{'-removed' if remove else ''}"
    path = this.site.output / experiment.label / "models" / name
    model = model_input(this.site.cache, experiment.model.id, experiment.model.revision)
    about = {"ranking": ranking, "selection": experiment.choice.science(), "cell": cells[ranking].parents[0].digest}
    save_pruned(model, chosen, path, remove=remove, about=about)
    print(path)
    return 0
