"""Several machines that publish one run, and several processes of one: what each may do, and what is done but once."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest
from conftest import wait_until
from fake_hub import Fault
from publish_world import REPOS, TITLES, World, copied, fixtures

HALF = ("run.share=1/2", "run.repos_a_day=4")


made = fixtures()[0]


@pytest.fixture
def machines(made: Path, tmp_path: Path) -> Iterator[tuple[World, World]]:
    """Each with a scratch of its own, and so with a ledger of its own."""
    (tmp_path / "here").mkdir(), (tmp_path / "there").mkdir()
    with copied(made, tmp_path / "here") as here:
        yield here, World(tmp_path / "there", here.hub, copytree(made, tmp_path / "there" / "places"))
        for fault in here.hub.faults:
            if fault.hold:
                fault.hold.set()  # else who is held would outlive a test that fails


def noted(world: World) -> int:
    """New repositories, by its ledger."""
    entries = json.loads((world.places / "scratch" / "hub" / "acme.json").read_text())["entries"]
    return sum(one["count"] for one in entries if one["kind"] == "new")


def ended(fork, code: int = 0) -> str:
    done = fork.finish()
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def must_be_once(world: World) -> None:
    hub = world.hub
    assert sorted(hub.created) == REPOS and sorted(repo for repo, _ in hub.committed) == REPOS
    assert len(hub.collections) == 2 and world.held() == {
        title: {repo} for title, repo in zip(TITLES, REPOS, strict=True)
    }
    assert all(len(one["items"]) == 1 for one in hub.collections.values())
    assert hub.files_now(REPOS[1])["adapter_model.safetensors"] == world.file("adapter_model.safetensors")


@pytest.mark.parametrize("at", ["/repos/create", "/preupload/", "/put/", "/commit/", "POST /api/collections", "/items"])
def test_one_machine_stands_still_while_the_other_does_it_all(machines, at):
    """The first has looked, and what it then asks for is answered when the second one has ended."""
    first, second = machines
    go_on = threading.Event()
    first.hub.faults = [Fault(at, hold=go_on, times=1)]
    slow = first.start(*HALF)
    wait_until(lambda: not first.hub.faults[0].times, 30, f"nothing was asked of {at}")
    ended(second.start(*HALF))
    go_on.set()
    ended(slow)
    must_be_once(first)
    assert noted(first) + noted(second) <= 4
    assert sorted(first.rows()["repository"]) == sorted(second.rows()["repository"])
    claimed = [*first.rows()["outcome"], *second.rows()["outcome"]]
    assert claimed.count("new") <= len(REPOS)


def test_two_machines_and_a_hub_with_faults(machines):
    hub = machines[0].hub
    hub.faults = [
        *(Fault("/repos/create", 429, headers={"Retry-After": "1"}, times=2), Fault("/preupload/", 503, times=2)),
        *(Fault("/commit/", -1, times=1), Fault("/commit/", lost=True, times=2), Fault("/items", 500, times=2)),
        *(Fault("/put/", -1, times=1), Fault("/api/collections", lost=True, times=1)),
    ]
    both = [world.start(*HALF) for world in machines]
    for one in both:
        ended(one)
    assert not any(fault.times for fault in hub.faults)
    must_be_once(machines[0])
    assert sum(map(noted, machines)) <= 4


def test_no_more_in_a_day_than_the_parts_of_both(machines):
    """A repository each."""
    short = ("run.repos_a_day=2", "run.share=1/2", "run.wait_minutes=1")
    both = [world.start(*short).finish() for world in machines]
    assert [one.returncode for one in both] == [2, 0], both
    assert "1 new repositories a day of this user are spent until" in both[0].stderr
    assert [noted(world) for world in machines] == [1, 1] and sorted(machines[0].hub.created) == REPOS
    ended(machines[0].start(*short))
    must_be_once(machines[0])


def test_two_copies_of_a_task_send_it_once(machines):
    """The second waits while the first one sends."""
    world, _ = machines
    go_on = threading.Event()
    world.hub.faults = [Fault("/put/", hold=go_on, times=1)]
    first = world.start()
    wait_until(lambda: not world.hub.faults[0].times, 30, "nothing was sent")
    second = world.start()
    wait_until(lambda: b"waiting for that to end" in os.pread(second.out.fileno(), 9999, 0), 30, "it does not wait")
    go_on.set()
    ended(first), ended(second)
    must_be_once(world)
    assert world.hub.stored_bytes == len(world.file("adapter_model.safetensors"))
    assert len([one for one in world.hub.log if one.path.startswith("/put/")]) == 1
    left = {path.suffix for path in (world.places / "scratch" / "hub").iterdir()}
    assert left == {".json"}
