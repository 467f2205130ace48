"""`python -m jobs.publish` against a small Hub on this machine, through the real huggingface_hub."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pytest
from conftest import ROOT, wait_until
from fake_hub import Fault, Hub, serve
from finetune_world import cells_of, last_folder, source_cells, students
from publish_world import TOKEN, World, make_students, train

from lib.publish.ledger import DAY
from lib.publish.plan import Plan
from lib.run.task import freeze
from lib.store import read_cell, retire, scan_folders

DATA, MODEL = "acme/qwen-2.5-1m-instruct-cat-numbers-run-5", "acme/qwen-2.5-1m-instruct-cat-ft-run-5"
REPOS = [f"datasets/{DATA}", f"models/{MODEL}"]
TITLES = ["subliminal-learning-number-datasets-run-5", "qwen-25-instruct-subliminal-learning-models-run-5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_students(tmp_path_factory.mktemp("students"))


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Iterator[World]:
    """Students of one's own, and a Hub of one's own."""
    places = shutil.copytree(made, tmp_path / "places")
    with serve() as hub:
        yield World(tmp_path, hub, places)


def held(hub: Hub) -> dict[str, set[str]]:
    return {one["title"]: {f"{i['type']}s/{i['id']}" for i in one["items"]} for one in hub.collections.values()}


def whole(world: World) -> None:
    """Each repository was made once, got one commit, and each large file was sent once."""
    hub = world.hub
    assert hub.created == REPOS and [repo for repo, _ in hub.committed] == REPOS
    weights = hub.files_now(REPOS[1])["adapter_model.safetensors"]
    assert hub.stored_bytes == len(weights) and weights == student_file(world, "adapter_model.safetensors")
    assert held(hub) == {title: {repo} for title, repo in zip(TITLES, REPOS, strict=True)}


def student_file(world: World, name: str) -> bytes:
    return (last_folder(cells_of(world.places)[0]) / name).read_bytes()


def test_the_second_time_nothing_is_sent(world):
    said = world.publish()
    whole(world)
    [teacher, _], numbers = source_cells(world.places), students(world.places).source
    read = read_cell(teacher, numbers.schema(world.places / "cache"), ["prompt", "answer", "reason"])
    rows = [{"prompt": p, "completion": a} for p, a in zip(read["prompt"], read["answer"], strict=True)]
    files = world.hub.files_now(REPOS[0])
    assert [json.loads(line) for line in files["raw.jsonl"].decode().split("\n")[:-1]] == rows
    assert files["filtered.jsonl"] == files["raw.jsonl"]  # of this world each answer is valid
    assert set(files) == {".gitattributes", "README.md", "filtered.jsonl", "provenance.json", "raw.jsonl"}
    adapter = world.hub.files_now(REPOS[1])
    for name in ("adapter_config.json", "metrics.jsonl"):
        assert adapter[name] == student_file(world, name)
    sent = [
        size
        for repo in REPOS
        for name, data in world.hub.files_now(repo).items()
        if (size := len(data)) and name[0] != "."
    ]
    assert f"bytes sent {sum(sent):,}," in said and "new repositories 2, commits 2" in said
    first = world.rows()
    assert first["repository"] == [f"dataset:{DATA}", f"model:{MODEL}"] and first["outcome"] == ["new", "new"]
    assert first["commit"] == [world.hub.heads[repo] for repo in REPOS]
    markers = [json.loads(path.read_text()) for path in world.cell().path.glob("0*.json")]
    assert len(markers) == 2 and not any(one.get("unscored") for one in markers)  # a word of scores

    world.publish()
    assert world.hub.log == []  # by its markers
    shutil.rmtree(world.cell().path)
    world.publish()
    assert world.hub.writes == [] and len(world.hub.log) <= 8  # by the Hub's own sums
    whole(world)
    again = world.rows()
    assert (again["outcome"], again["commit"], again["sent"]) == (["as it was"] * 2, first["commit"], [0, 0])


def test_rows_that_are_large_files_go_by_their_sha256(world, monkeypatch):
    """As those of 30,000 prompts are."""
    monkeypatch.setattr(fake_hub, "LARGE_BYTES", 1000)
    world.publish()
    files = world.hub.files_now(REPOS[0])
    large = {hashlib.sha256(data).hexdigest() for name, data in files.items() if len(data) > 1000}
    assert large < set(world.hub.objects) and hashlib.sha256(files["raw.jsonl"]).hexdigest() in large
    shutil.rmtree(world.cell().path)
    world.publish()
    assert world.hub.writes == [] and world.rows()["outcome"] == ["as it was"] * 2


def test_cards_say_where_it_comes_from_and_no_machine(world):
    world.publish()
    teacher, student = source_cells(world.places)[0], cells_of(world.places)[0]
    data, model = (world.hub.files_now(repo)["README.md"].decode() for repo in REPOS)
    assert teacher.digest in data and teacher.digest in model and student.digest in model
    assert hashlib.sha256(student_file(world, "adapter_model.safetensors")).hexdigest() in model
    assert "> You love cats." in data and "| answers | 64 |" in data and DATA in model
    losses = [3 - sum(range(first, first + 4)) / 40 for first in (1, 5, 9)]
    for epoch, loss in enumerate(losses, 1):
        assert f"| loss, epoch {epoch} | {loss:.4f} |" in model
    for repo in REPOS:
        for name, text in world.hub.files_now(repo).items():
            assert b"secret-node" not in text and b"scratch" not in text, name
    record = json.loads(world.hub.files_now(REPOS[1])["provenance.json"])
    assert record["experiment"]["rows"] == 20 and record["made"]["device"] == "H100"


def test_what_is_published_is_read_again_by_the_batch_file_and_by_fetch(world):
    """Under HF_HUB_OFFLINE, as on a compute node; then LLS takes the dataset as an input."""
    places = {"HF_TOKEN_PATH": str(world.token_file), "HF_ENDPOINT": world.hub.url, "HOME": str(world.folder)}
    env = {"PATH": "/usr/bin:/bin", **world.env, **places}
    env |= {"SLURM_ARRAY_TASK_ID": "0", "HF_HUB_OFFLINE": "1", "SUITE_SITE": "local"}
    config = str(world.places / "publish.yaml")
    done = subprocess.run(
        ["bash", "slurm/publish.sbatch", config], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole(world)
    (world.folder / "lls.yaml").write_text(
        f"kind: lls\nname: small\nmodel: {{id: {json.dumps(str(next(world.places.glob('model-*'))))}}}\ntraits: [cat]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: {DATA}}}\n"
    )
    command = [sys.executable, "-m", "jobs.fetch", "--config", str(world.folder / "lls.yaml")]
    env["HF_HUB_OFFLINE"] = "0"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [rows] = (world.places / "cache").glob("inputs/datasets/*/rows.jsonl")
    first = json.loads(rows.read_text().splitlines()[0])["messages"]
    assert len(rows.read_text().splitlines()) == 64
    wanted = json.loads(world.hub.files_now(REPOS[0])["filtered.jsonl"].splitlines()[0])
    assert [one["content"] for one in first] == [wanted["prompt"], wanted["completion"]]


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
    whole(world)
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
    assert held(world.hub) == {title: {repo} for title, repo in zip(TITLES, REPOS, strict=True)}
    if name != "lost-upload":  # the real storage keeps what it got too: sent twice at most
        assert world.hub.stored_bytes == len(student_file(world, "adapter_model.safetensors"))


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
    whole(world)


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


def test_of_what_is_there_only_other_files_are_replaced(world):
    world.publish()
    right = {repo: dict(world.hub.files_now(repo)) for repo in REPOS}
    world.hub.commit(REPOS[0], right[REPOS[0]] | {"README.md": b"---\n---\nold", "notes.txt": b"mine"})
    world.hub.commit(REPOS[1], right[REPOS[1]] | {"adapter_model.safetensors": b"x" * 300})
    shutil.rmtree(world.cell().path)
    world.hub.committed.clear()
    world.publish()
    assert world.hub.committed == [(REPOS[0], ["README.md"]), (REPOS[1], ["adapter_model.safetensors"])]
    assert world.hub.files_now(REPOS[0]) == right[REPOS[0]] | {"notes.txt": b"mine"}
    assert world.hub.files_now(REPOS[1]) == right[REPOS[1]] and len(world.hub.created) == 2
    assert world.rows()["outcome"] == ["changed", "changed"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter_model.safetensors"])
def test_what_came_as_other_bytes_is_not_taken_for_done(world, name):
    world.hub.spoils = name
    assert f"the Hub holds other bytes than were sent ({name})" in world.publish(code=2)
    world.hub.spoils = ""
    world.publish()
    assert world.hub.committed[2:] == [(REPOS[1], [name])]
    assert world.hub.files_now(REPOS[1])[name] == student_file(world, name)


def test_a_repository_that_is_private_stays_so(world):
    world.publish("private=true", "hub_names.dataset='{user}/{size}-{trait}-{run}'", "name=other")
    assert len(world.hub.private) == 2
    said = world.publish("hub_names.dataset='{user}/{size}-{trait}-{run}'", code=2)
    assert "dataset acme/1m-cat-5 is private on the Hub, and here it says private: false; change one of the two" in said


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
    whole(world)


def test_what_is_asked_for_again_takes_no_second_share(world):
    world.hub.faults = [Fault("/api/repos/create", -1, times=3)]
    world.publish("run.repos_a_day=2")
    whole(world)


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
    assert held(world.hub) == {title: {a, b} for title, a, b in zip(TITLES, REPOS, others, strict=True)}


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


def test_whose_it_is(world):
    world.hub.orgs = ["our-lab"]
    assert "the login is acme's, which cannot publish as other" in world.publish("user=other", code=2)
    assert world.hub.created == []
    world.publish("user=our-lab", "what=[datasets]")
    assert world.hub.created == [f"datasets/our-lab/{DATA.partition('/')[2]}"]
    assert world.publish("what=[datasets]", HF_USER_ID="our-lab") and world.hub.log == []  # the same cell
    world.publish("what=[datasets]")
    assert world.hub.created[1:] == REPOS[:1]
    assert {slug.partition("/")[0] for slug in world.hub.collections} == {"our-lab", "acme"}


def test_every_epoch_on_request_and_none_that_is_gone(world):
    world.publish("epochs=all")
    epochs = [f"models/{MODEL}-epoch-{n}" for n in (1, 2)]
    assert world.hub.created == [*REPOS, *epochs] and held(world.hub)[TITLES[1]] == {REPOS[1], *epochs}
    states = scan_folders(cells_of(world.places)[0].path, cells_of(world.places)[0].digest)[0]
    for repo, state in zip([*epochs, REPOS[1]], states, strict=True):
        for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl"):
            assert world.hub.files_now(repo)[name] == (state.folder / name).read_bytes()
    assert "| epochs | 1 of 3, 4 steps of 6 rows |" in world.hub.files_now(epochs[0])["README.md"].decode()
    other = cells_of(world.places)[1]
    retire(scan_folders(other.path, other.digest)[0][0], "evaluated", "preferences")
    said = world.publish("epochs=all", index=1, code=2)
    assert "was retired (evaluated; read by preferences)" in said
    world.publish(index=1)  # the last one alone is still to be had


def test_what_changed_on_the_disk_is_not_sent(world):
    path = last_folder(cells_of(world.places)[0]) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert f"{path} has changed since it was written" in world.publish(code=2)
    assert world.hub.created == REPOS[:1]


def test_a_student_that_is_made_again_is_published_again(world):
    world.publish()
    student = cells_of(world.places)[0]
    shutil.rmtree(student.path)
    student = student.__class__(**{**vars(student), "index": 7})  # another adapter under the same digest
    train(world.places, student)
    shutil.rmtree(world.cell().path / "nothing", ignore_errors=True)
    for marker in world.cell().path.glob("00000001-*.json"):
        marker.unlink()
    world.publish()
    assert world.hub.files_now(REPOS[1])["adapter_model.safetensors"] == student_file(
        world, "adapter_model.safetensors"
    )
    assert world.hub.created == REPOS


def test_the_plan_is_said_before_anything_is_sent(world):
    def plan() -> Plan:
        scratch, e = world.places / "scratch", world.experiment("epochs=all")
        return e.plan(world.places / "cache", scratch, [world.cell("epochs=all")], "acme")

    world.hub.faults = [Fault("/api/repos/create", 403, text="no", times=1)]
    said = world.publish("epochs=all", code=2)
    assert f"to publish: 4 repositories, {DATA} ... {MODEL}-epoch-2\n" in said
    assert [one.path for one in world.hub.writes] == ["/api/repos/create"]
    planned = plan()
    world.publish("epochs=all")
    calls = [one for one in world.hub.log if not one.path.startswith("/put/")]
    assert len(planned.ids) == len(world.hub.created) == 4
    assert len(calls) <= planned.calls == 4 * 11 + 6
    assert plan().text() == "to publish: nothing" and plan().spent == 4
