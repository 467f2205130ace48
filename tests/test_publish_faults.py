"""Publishing where something goes wrong: kills, a Hub that is busy or says no, limits that are spent, two at once."""

import json
import os
import signal
import threading
import time

import pytest
from conftest import wait_until
from fake_hub import Fault
from publish_world import MODEL, REPOS, TITLES, TOKEN, fixtures

from lib.publish.ledger import DAY
from lib.run.task import freeze

made, world = fixtures()


@pytest.mark.parametrize("after", [False, True], ids=["between-upload-and-commit", "between-commit-and-marker"])
def test_a_kill_is_resumed(world, after):
    let_go = threading.Event()
    world.hub.faults = [Fault(f"{MODEL}/commit/", status=0 if after else 503, lost=after, hold=let_go, times=1)]
    killed = world.start()
    wait_until(lambda: any(f"{MODEL}/commit/" in one.path for one in world.hub.log), 30, "no commit")
    if after:
        wait_until(lambda: len(world.hub.committed) == 2, 10, "not committed")
    os.kill(killed.pid, signal.SIGKILL)
    killed.finish()
    let_go.set()
    assert len(world.hub.committed) == 1 + after and world.hub.stored_bytes > 0
    world.publish()
    world.must_be_whole()
    assert world.rows()["outcome"] == ["new", "as it was" if after else "changed"]


IN_PROGRESS = "Cannot create repo: another conflicting operation is in progress"
FAULTS = {
    "retry-after": (Fault("/api/repos/create", 429, headers={"Retry-After": "7"}, times=2), "slept 7"),
    "window": (
        Fault("/preupload/", 429, headers={"RateLimit": '"api";r=0;t=55', "Retry-After": "3"}, times=1),
        "slept 56",
    ),
    "quota": (
        Fault(
            "/commit/",
            429,
            headers={"RateLimit": '"api";r=949;t=271'},  # another window, which is not used up
            text="You have exceeded the rate limit for repository commits (128 per hour). Retry in about 1 hour.",
            times=1,
        ),
        "slept 3600",
    ),
    "down": (Fault(f"/api/models/{MODEL}", 503, times=3), "slept 4"),
    "html": (Fault("/api/validate-yaml", 502, times=1), "the Hub answered 502"),
    "cut": (Fault("/api/repos/create", -1, times=1), "RemoteProtocolError"),
    "cut-upload": (Fault("/put/", -1, times=2), "the connection failed"),
    "lost-creation": (Fault("/api/repos/create", lost=True, times=1), "the connection failed"),
    "lost-upload": (Fault("/put/", lost=True, times=1), "the connection failed"),
    "lost-commit": (Fault("/commit/", lost=True, times=2), "the connection failed"),
    "lost-collection": (Fault("/api/collections", lost=True, times=2), "the connection failed"),
    "lost-item": (Fault("/items", lost=True, times=2), "the connection failed"),
    "in-progress": (Fault("/api/repos/create", 409, text=IN_PROGRESS, times=3), "slept 4"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_only_for_now_is_tried_again_and_sent_once(world, name):
    fault, says = FAULTS[name]
    world.hub.faults = [Fault(**vars(fault))]
    said = world.publish()
    assert says in said and "Traceback" not in said
    assert world.hub.faults[0].times == 0
    assert world.hub.created == REPOS and [repo for repo, _ in world.hub.committed] == REPOS
    assert world.held() == {title: {repo} for title, repo in zip(TITLES, REPOS, strict=True)}
    if name != "lost-upload":  # the real storage keeps what it got too: sent twice at most
        assert world.hub.stored_bytes == len(world.file("adapter_model.safetensors"))


def test_a_wait_that_is_too_long_ends_the_task_with_a_sentence(world):
    world.hub.faults = [Fault("/api/repos/create", 429, headers={"Retry-After": "90000"})]
    said = world.publish(code=2)
    until = time.strftime("%Y-%m-%d", time.localtime(time.time() + 90000))
    assert f"asks to wait until {until}" in said and "`make resume CONFIG=" in said and "Traceback" not in said
    assert "slept" not in said
    world.hub.faults = [Fault("/api/repos/create", 500)]
    said = world.publish(code=2)
    assert "tried 8 times" in said and len([r for r in world.hub.log if r.path == "/api/repos/create"]) == 8


def test_the_warning_ends_a_wait_and_the_task_is_run_again(world):
    """By the code that the batch script takes for: requeue."""
    world.hub.faults = [Fault("/api/repos/create", 429, headers={"Retry-After": "600"}, times=1)]
    waiting = world.start(passing=False)
    wait_until(lambda: any(one.path == "/api/repos/create" for one in world.hub.log), 30, "nothing was asked")
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(waiting.pid, signal.SIGUSR1)
    done = waiting.finish()
    assert done.returncode == 128 + signal.SIGUSR1 and time.monotonic() - began < 10
    assert "stopped by SIGUSR1" in done.stderr and "Traceback" not in done.stderr
    world.publish()
    world.must_be_whole()


REFUSED = {
    "no-right": (
        Fault("/api/repos/create", 403, text="no rights"),
        "the Hub answered 403 (no rights): the token may not",
    ),
    "commit": (Fault("/commit/", 403, text=f"no, {TOKEN}"), "the Hub answered 403 (no, (token)): the token may not"),
    "card": (Fault("/api/validate-yaml", 400, text="bad license"), "check hub_names and license"),
    "room": (Fault("/preupload/", 413, text="too large"), "it has no room for this"),
    "gone": (Fault("/items", 404), "there is no such user, organisation or collection"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_no_for_good_is_one_sentence_and_asked_once(world, name):
    fault, says = REFUSED[name]
    world.hub.faults = [fault]
    said = world.publish("run.cells=1", code=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0], said
    assert "Traceback" not in said and TOKEN not in said
    assert len([one for one in world.hub.log if fault.word in one.path]) == 1


def test_the_token_is_looked_at_before_anything_is_done(world, tmp_path):
    world.hub.role = "read"
    assert "the token of acme may only read: log in with" in world.publish(code=2)
    world.hub.role = "write"
    world.token_file.write_text("hf_wrong")
    assert "it does not know the token; log in" in world.publish(code=2)
    world.token_file.unlink()
    assert f"no token of the Hub in {world.token_file}: log in" in world.publish(code=2)
    assert world.hub.created == [] and world.hub.writes == []


def test_the_token_stands_nowhere(world):
    world.hub.faults = [Fault("/items", 500, text=f"Bearer {TOKEN}", times=2)]
    said = world.publish()
    assert TOKEN not in said
    for path in world.folder.rglob("*"):
        if path.is_file() and path != world.token_file:
            assert TOKEN.encode() not in path.read_bytes(), path
    assert any(one.authorization == f"Bearer {TOKEN}" for one in world.hub.log)


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter_model.safetensors"])
def test_what_came_as_other_bytes_is_not_taken_for_done(world, name):
    world.hub.spoils = name
    assert f"the Hub holds other bytes than were sent ({name})" in world.publish(code=2)
    world.hub.spoils = ""
    world.publish()
    assert world.hub.committed[2:] == [(REPOS[1], [name])]
    assert world.hub.files_now(REPOS[1])[name] == world.file(name)


def test_the_days_share_of_new_repositories(world):
    short = ("run.repos_a_day=4", "run.share=1/4", "run.wait_minutes=5")
    said = world.publish(*short, code=2)
    assert "new repositories: 1 a day here (share 1/4 of 4), 0 made in the last 24 hours: 2 days" in said
    tomorrow = time.strftime("%Y-%m-%d", time.localtime(time.time() + DAY))
    assert (
        f"1 new repositories a day of this user are spent until {tomorrow}" in said and "`make resume CONFIG=" in said
    )
    assert world.hub.created == REPOS[:1]
    assert world.publish(*short, code=2) and world.hub.created == REPOS[:1]  # another task, the same day
    ledger = world.places / "scratch" / "hub" / "acme.json"
    entries = json.loads(ledger.read_text())
    for one in entries["entries"]:
        one["time"] -= DAY
    ledger.write_text(json.dumps(entries))
    world.publish(*short)
    world.must_be_whole()


def test_what_is_asked_for_again_takes_no_second_share(world):
    world.hub.faults = [Fault("/api/repos/create", -1, times=3)]
    world.publish("run.repos_a_day=2")
    world.must_be_whole()


def test_calls_and_commits_are_held_back(world):
    said = world.publish("run.calls=10", "run.wait_minutes=1", code=2)
    assert "10 calls in 5 minutes of this user are spent until" in said
    assert len(world.hub.log) <= 12  # the first two are made before it is known whose they are
    said = world.publish("name=more", "run.commits_an_hour=1", "run.wait_minutes=1", code=2)
    assert "1 commits an hour of this user are spent until" in said and len(world.hub.committed) == 1


def test_two_tasks_at_once_make_each_collection_once(world):
    """The first is held where it makes one, until the second has looked for it, or was kept from looking."""
    let_go = threading.Event()
    world.hub.faults = [Fault("POST /api/collections", hold=let_go, times=1)]
    both = [world.start(index=index) for index in (0, 1)]
    wait_until(lambda: len(world.hub.created) == 2, 30, "no two datasets")
    end = time.monotonic() + 1
    while time.monotonic() < end and len([r for r in world.hub.log if r.path == "/api/collections"]) < 3:
        time.sleep(0.02)
    let_go.set()
    for one in both:
        done = one.finish()
        assert done.returncode == 0, done.stdout + done.stderr
    others = [repo.replace("-cat-", "-neutral-") for repo in REPOS]
    assert sorted(world.hub.created) == sorted([*REPOS, *others])
    assert len(world.hub.collections) == 2
    assert world.held() == {title: {a, b} for title, a, b in zip(TITLES, REPOS, others, strict=True)}


def test_two_copies_of_one_task_make_it_once(world):
    """Both at once; then one that is held behind its commit, while the other one passes it."""
    both = [world.start() for _ in range(2)]
    for one in both:
        done = one.finish()
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(world.hub.created) == REPOS and sorted(repo for repo, _ in world.hub.committed) == REPOS
    let_go = threading.Event()
    world.hub.faults = [Fault("/items", hold=let_go, times=1)]
    other = ("hub_names.dataset='{user}/{size}-{trait}-{run}'", "what=[datasets]")
    slow = world.start(*other)
    wait_until(lambda: world.hub.faults[0].times == 0, 30, "the first was not held")
    world.publish(*other)
    first = world.rows(*other)
    let_go.set()
    assert slow.finish().returncode == 0
    assert world.rows(*other) == first and first["outcome"] == ["as it was"]  # what was noted first stays
    assert len(world.hub.committed) == 3


def test_what_is_wrong_with_the_login_is_asked_once_a_task(world):
    world.token_file.write_text("hf_wrong")
    cells = [world.cell(index=index) for index in (0, 1)]
    said = world.publish(f"--tasks={freeze(world.places / 'scratch' / 'out_run5', [cells])}", code=2)
    assert len([line for line in said.splitlines() if "it does not know the token" in line]) == 2
    assert [one.path for one in world.hub.log].count("/api/whoami-v2") == 1
