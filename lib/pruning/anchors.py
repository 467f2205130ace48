"""Anchors: figures that others have measured, computed here before anything else is believed."""

from lib.base.errors import USER, UserError
from lib.pruning import kernel, weight_kernel
from lib.pruning.findings import find
from lib.pruning.looks import DENSE
from lib.pruning.sparsity import Sparsity
from lib.pruning.sparsity_export import expected_table as sparse_table
from lib.pruning.sparsity_export import measured
from lib.pruning.sweep import Sweep
from lib.pruning.tables import expected_table
from lib.report.tables import Table
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.parents import why_blocked
from lib.run.task import run_rows
from lib.store import Cell


def compare(this: Job) -> int:
    """Computes the cells that are meant and can run, by the job's own code, so that they are done for it too; 2 where a
    figure is another."""
    experiment = this.experiment
    if not isinstance(experiment, Sweep | Sparsity) or not experiment.expected:
        raise UserError(f"{this.config} expects no figures; give CONFIG of a sweep or a sparsity with `expected`")
    wanted = {one.method or DENSE for one in experiment.expected}
    for cell in this.cells():
        method = cell.name.split("-")[0]
        can_run = method in wanted and not extent(cell).whole and not why_blocked(cell)
        if can_run and (code := _run(this, cell)):
            return code
    table = _table(this)
    print(table.text())
    others = [row for row in table.rows if "other" in row]
    missing = [row for row in table.rows if "missing" in row]
    said = f"{len(table.rows) - len(others) - len(missing)} of {len(table.rows)} as expected"
    print(f"{said}, {len(missing)} need what is not computed yet" if missing else said)
    return USER if others else 0


def _run(this: Job, cell: Cell) -> int:
    one = Job(this.experiment, this.config, this.site, cell.index, "", False, _kept=this._kept)
    if isinstance(this.experiment, Sweep):
        sweep = this.experiment
        return run_rows(one, lambda cell: kernel.load_kernel(this, sweep, cell))
    sparsity = this.of(Sparsity)
    return run_rows(one, lambda cell: weight_kernel.load_kernel(this, sparsity, cell))


def _table(this: Job) -> Table:
    if isinstance(this.experiment, Sweep):
        return expected_table(find(this.experiment, this.cells(), this.site.cache))
    return sparse_table(this.of(Sparsity), measured(this))
