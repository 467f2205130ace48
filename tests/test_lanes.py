"""One throttle over all stages of a pipeline: how the GPUs are parted, and what a real Slurm then runs at once."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from chains import Chain, repository_with_chain
from conftest import wait_until

from lib.cluster.arrays import Array
from lib.cluster.lanes import Demand, Lane, part
from lib.run.experiment import Needs


def widths(lanes: list[Lane]) -> int:
    return sum(lane.gpus for lane in {id(lane): lane for lane in lanes}.values())


def test_lanes_go_by_work_and_keep_to_the_throttle():
    sizes = {"0.5b": Demand(1.0, 1), "7b": Demand(5.0, 1), "72b": Demand(60.0, 2)}
    found = part(sizes, [], 16)
    assert {size: lane.gpus for size, lane in found.items()} == {"0.5b": 1, "7b": 2, "72b": 13}
    found = part(sizes, [], 3)  # too few for three lanes
    assert found["0.5b"] is found["7b"] and (found["0.5b"].gpus, found["72b"].gpus) == (1, 2)
    assert len({id(lane) for lane in part(sizes, [], 1).values()}) == 1
    assert found["72b"].tasks(Array([], Needs(2))) == 1 and found["72b"].tasks(Array([], Needs(0))) == 2


def test_what_is_under_way_keeps_its_lane_and_the_others_share_what_is_left():
    old = Lane("7b", 3, {"7b"}, {"11", "12"})
    found = part({"7b": Demand(1.0, 1), "14b": Demand(1.0, 1)}, [old], 4)
    assert found["7b"] is old and found["14b"].gpus == 1 and found["14b"].arrays == set()
    found = part({"14b": Demand(1.0, 2)}, [old], 4)  # one is left, and it takes two: after what is in the other lane
    assert found["14b"] is old
    found = part({"72b": Demand(1.0, 4), "7b": Demand(1.0, 1)}, [old, Lane("30", 1, set(), {"30"})], 4)
    assert found["72b"] is found["7b"] and found["7b"].arrays == {"11", "12", "30"} and found["7b"].gpus == 4
    after = old.after(Array([], Needs(1), frozenset({"11_3", "9_1", "8"})))
    assert after == {"11", "12", "9_1", "8"}  # one of its tasks is part of the whole


def test_no_parting_ever_promises_more_than_there_is():
    dice = np.random.default_rng(3)
    for _ in range(2000):
        throttle, live = int(dice.integers(1, 20)), []
        for name in range(int(dice.integers(0, 4))):
            if (left := throttle - widths(live)) > 0:
                sizes = {f"s{name}"} if dice.random() < 0.7 else set()
                live.append(Lane(str(name), int(dice.integers(1, left + 1)), sizes, {f"{name}0"}))
        most = min(throttle, 4)
        wanted = {
            f"s{i}": Demand(float(dice.random()), int(dice.integers(1, most + 1)))
            for i in range(int(dice.integers(1, 8)))
        }
        found = part(wanted, live, throttle)
        assert found.keys() == wanted.keys()
        assert all(lane.gpus >= wanted[size].least for size, lane in found.items())
        every = set().union(*(lane.arrays for lane in live))
        alone = [lane for lane in found.values() if live and lane not in live and lane.arrays == every]
        assert widths([*found.values(), *([] if alone else live)]) <= throttle


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return repository_with_chain(tmp_path_factory.mktemp("lanes") / "suite")


def together(rows: list[dict[str, str]]) -> int:
    """The most tasks that ran in the same second."""
    spans = [(row["Start"], row["End"]) for row in rows]
    return max(sum(a <= at < b for a, b in spans) for at, _ in spans)


def test_a_real_slurm_runs_no_more_over_all_stages_and_comes_to_an_end(fresh_slurm, repository, tmp_path):
    """Three sizes on two GPUs, and a third one at work on a cell that was submitted by itself. `count` waits for
    nothing, so its stage overlaps with the others."""
    chain = Chain(fresh_slurm, repository, tmp_path, "1m-a", "1m-b", "2m-a", "2m-b", "3m-a")
    stages = [{"config": f"{stage}.yaml"} for stage in ("write", "teach", "count")]
    (tmp_path / "whole.yaml").write_text(json.dumps({"kind": "pipeline", "name": "whole", "wanted": stages}))
    chain.env["SUITE_THROTTLE"] = "3"
    (chain.hold / "write-1m-a").touch()
    alone = chain.submit("write", "--array=0")
    assert len(re.findall(r"--array=\S+%1 ", chain.call("submit", "whole", "--dry"))) == 6
    said = chain.call("submit", "whole")
    jobs = re.findall(r"Slurm job (\d+): cells", said)
    assert len(jobs) == 6, said  # of each stage one a lane
    (shows,) = re.findall(r"Slurm job (\d+): make report", said)
    twice = chain.call("submit", "whole")  # nothing of it is sent again, and one job shows it
    assert re.findall(r"Slurm job (\d+): cells", twice) == [] and f"make report, in place of {shows}" in twice
    assert len(fresh_slurm.run("squeue", "-h", "-n", "report-whole", "-t", "PD").splitlines()) == 1
    (chain.hold / "write-1m-a").unlink()

    def states() -> set[str]:
        return {cell["state"] for stage in chain.status("whole") for cell in stage["cells"]}

    wait_until(lambda: states() == {"done"}, 180, lambda: chain.call("status", "whole"), every=2)
    rows = [row for job in [alone, *jobs] for row in chain.slurm.sacct(job)]
    assert len(rows) == 15 and 1 < together(rows) <= 3, rows
    assert {row["State"] for row in rows} == {"COMPLETED"}

    assert "Slurm job" not in chain.call("submit", "whole").partition("== its results")[0]  # all stages are done
    for stage in ("write", "count"):
        shutil.rmtree(chain.cell(stage, "3m-a"))
    said = chain.call("resume", "whole")
    again = re.findall(r"Slurm job (\d+): cells", said)
    assert len(again) == 2, said
    wait_until(lambda: states() == {"done"}, 60, lambda: chain.call("status", "whole"), every=2)
