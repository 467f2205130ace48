"""From cells to tasks, arrays, time limits and a share of the GPUs; what a frozen array stands for, and who may not."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lib.base.errors import UserError
from lib.cluster.arrays import Array, arrays_of, shares
from lib.cluster.plan import CellPlan
from lib.run.experiment import Estimate, Needs, RunSpec
from lib.run.extent import Extent
from lib.run.task import Tasks, freeze, frozen
from lib.store import Cell


@dataclass
class Sizes:
    """An experiment of cells of two sizes."""

    run: RunSpec
    start: float = 9.0
    large: set[str] = field(default_factory=set)
    sized: bool = True

    def start_seconds(self, cache: Path) -> float:
        return self.start

    def needs(self, cache: Path, cell: Cell) -> Needs:
        return Needs(2, 300) if cell.name in self.large else Needs(1)

    def places(self) -> dict[str, list[str]]:
        return {"SIZES": []} if self.sized else {}

    def load_of(self, cell: Cell) -> str:
        return "large" if cell.name in self.large else "small"


def plans(tmp_path: Path, **seconds: float | None) -> list[CellPlan]:
    found = []
    for index, (name, value) in enumerate(seconds.items()):
        cell = Cell(index, name, 10, "5a" * 32, tmp_path / "run" / "cells" / f"{name}-5a5a5a5a")
        estimate = None if value is None else Estimate(value, 0)
        found.append(CellPlan(cell, Extent([], [], [(0, 10)], []), [(0, 10)], estimate, 1))
    return found


def cells_of(arrays: list[Array]) -> list[list[str]]:
    return [["".join(cell.name for cell in task) for task in array.cells] for array in arrays]


def test_cells_share_a_task_until_starting_costs_a_tenth_of_it(tmp_path):
    """9 s of start are a tenth of a task that computes for 81 s."""
    some = plans(tmp_path, a=40.0, b=40.0, c=2.0, d=81.0, e=None, f=30.0)
    for cells, want in ((1, "a b c d e f"), (4, "abcd ef"), ("auto", "abc d e f")):
        assert cells_of(arrays_of(Sizes(RunSpec(cells=cells)), tmp_path, some, {}, 1e9)) == [want.split()], cells
    with_start = Sizes(RunSpec(cells="auto"), start=0.0)
    assert cells_of(arrays_of(with_start, tmp_path, some, {}, 1e9)) == [list("abcdef")]


def test_what_asks_for_the_same_and_waits_for_the_same_is_an_array(tmp_path):
    sizes = Sizes(RunSpec(cells="auto"), large={"b", "d"})
    some = plans(tmp_path, a=1.0, b=1.0, c=1.0, d=1.0, e=1.0)
    after = {"e": frozenset({"7"})}
    arrays = arrays_of(sizes, tmp_path, some, after, 1e9)
    assert cells_of(arrays) == [["ac"], ["bd"], ["e"]]
    assert [(one.needs.gpus, one.indices, sorted(one.after)) for one in arrays] == [
        (1, [0], []),
        (2, [1], []),
        (1, [4], ["7"]),
    ]


def test_cells_of_a_size_wait_together_and_for_no_other_size(tmp_path):
    some, large = plans(tmp_path, a=1.0, b=1.0, c=1.0, d=1.0, e=1.0), {"b", "d"}
    after = {name: frozenset({f"7_{i}"}) for i, name in enumerate("abcd")}
    arrays = arrays_of(Sizes(RunSpec(cells="auto"), large=large), tmp_path, some, after, 1e9)
    assert [("".join(*cells), sorted(one.after)) for one, cells in zip(arrays, cells_of(arrays), strict=True)] == [
        *(("ac", ["7_0", "7_2"]), ("bd", ["7_1", "7_3"]), ("e", []))
    ]
    apart = arrays_of(Sizes(RunSpec(cells="auto"), large=large, sized=False), tmp_path, some, after, 1e9)
    assert cells_of(apart) == [["ac"], ["bd"], ["e"]]


def test_a_time_limit_is_the_estimate_with_a_margin_inside_the_partitions(tmp_path):
    for limit, seconds, want in ((1e9, 3591.0, 135), (1e9, 1.0, 20), (60, 3591.0, 60), (1e9, None, None)):
        (array,) = arrays_of(Sizes(RunSpec()), tmp_path, plans(tmp_path, a=seconds), {}, limit)
        assert array.minutes == want, (limit, seconds)


def test_all_arrays_together_keep_to_the_sites_gpus(tmp_path):
    def array(count: int, gpus: int) -> Array:
        return Array([[one] for one in plans(tmp_path, **{f"c{i}": 1.0 for i in range(count)})], Needs(gpus))

    assert shares([array(15, 1)], 16) == [16] and shares([array(100, 1)], 16) == [16]
    assert shares([array(16, 1), array(16, 2), array(4, 8)], 32) == [6, 6, 1]  # 16 : 32 : 32 of 32 GPUs
    assert shares([array(3, 4), array(1, 0)], 2) == [1, 1]  # never none
    total = [(count, gpus) for count in (1, 5, 40) for gpus in (1, 2, 4)]
    for count, gpus in total:
        arrays = [array(count, gpus), array(7, 1), array(9, 2)]
        used = sum(n * one.needs.gpus for n, one in zip(shares(arrays, 64), arrays, strict=True))
        assert used <= 64, (count, gpus)


def test_a_frozen_array_is_believed_only_for_what_was_written(tmp_path):
    cells = [plan.cell for plan in plans(tmp_path, a=1.0, b=1.0, c=1.0)]
    name = freeze(tmp_path, [cells[:2], cells[2:]])
    assert frozen(tmp_path, name) == Tasks({"0": ["a", "b"], "2": ["c"]}, dict.fromkeys("abc", "5a" * 32))
    assert freeze(tmp_path, [cells[:2], cells[2:]]) == name
    (path,) = (tmp_path / "arrays").iterdir()
    whole = path.read_bytes()
    for wrong in (b"", whole[:-3], whole.replace(b'"c"', b'"d"'), b"[" * 10**5, b'{"cells": 1e999}', b"\xff"):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="is not what was submitted; submit again"):
            frozen(tmp_path, name)
    for odd in ("../../x", "", "0" * 15, "g" * 16, "0" * 16):
        with pytest.raises(UserError, match="submit again"):
            frozen(tmp_path, odd)
