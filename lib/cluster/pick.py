"""Cells by what they are of (a size, a trait), where their experiment has such axes: another way to say ARRAY."""

from collections.abc import Mapping
from itertools import product

from lib.base.errors import UserError, nearest
from lib.cluster.slurm import format_array
from lib.run.experiment import Experiment


def picked(experiment: Experiment, wanted: Mapping[str, str]) -> str:
    """ARRAY's text for the cells that have one of the given values on every axis; '' where none is given."""
    axes = experiment.axes()
    given = {axis: values for axis, text in wanted.items() if (values := text.replace(",", " ").split())}
    for axis, values in given.items():
        if axis not in axes:
            raise UserError(f"{axis}=... picks nothing of kind {experiment.kind}; ARRAY=0-2 names cells")
        for value in values:
            if value not in axes[axis]:
                known = ", ".join(axes[axis])
                raise UserError(f"{axis}: {value!r} is none of {known}{nearest(value, axes[axis])}")
    chosen = {axis: set(given.get(axis, values)) for axis, values in axes.items()}
    cells = [
        index
        for index, place in enumerate(product(*axes.values()))
        if all(value in chosen[axis] for axis, value in zip(axes, place, strict=True))
    ]
    return format_array(cells) if given else ""
