"""Cells by what they are of (a size, a trait), where their experiment says so: another way to say ARRAY."""

from collections.abc import Iterable, Mapping

from lib.base.errors import UserError, nearest
from lib.cluster.slurm import format_array
from lib.run.experiment import Experiment


def words_of(wanted: Mapping[str, str]) -> dict[str, list[str]]:
    """What was said of each kind of place; nothing of those of which nothing was."""
    found = {name: text.replace(",", " ").split() for name, text in wanted.items() if text}
    if empty := [name for name, values in found.items() if not values]:
        raise UserError(f"{empty[0]}= names nothing; leave it out to mean all")
    return found


def must_be_known(name: str, values: Iterable[str], known: list[str]) -> None:
    for value in values:
        if value not in known:
            raise UserError(f"{name}: {value!r} is none of {', '.join(known) or 'nothing here'}{nearest(value, known)}")


def picked(experiment: Experiment, wanted: Mapping[str, str]) -> str:
    """ARRAY's text for the cells that have one of the given values in every place; '' where none is given."""
    places = experiment.places()
    given = words_of(wanted)
    for name, values in given.items():
        if name not in places:
            raise UserError(f"{name}=... picks nothing of kind {experiment.kind}; ARRAY=0-2 names cells")
        must_be_known(name, values, list(dict.fromkeys(places[name])))
    cells = [
        index
        for index in range(len(experiment.names()))
        if all(places[name][index] in values for name, values in given.items())
    ]
    if given and not cells:
        raise UserError(f"no cell is of {' and '.join(f'{name}={wanted[name]}' for name in given)}")
    return format_array(cells) if given else ""
