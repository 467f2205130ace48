"""`python -m jobs.publish` against a small Hub on this machine, through the real huggingface_hub."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import fake_hub
from conftest import ROOT
from fake_hub import Fault
from finetune_world import cells_of, last_folder, source_cells, students
from publish_world import DATA, MODEL, REPOS, TITLES, fixtures, train

from lib.lora.metrics import WEIGHTS
from lib.publish.plan import Plan
from lib.run.extent import extent
from lib.run.parents import made_again
from lib.store import read_cell, retire, scan_folders

made, world = fixtures()


def test_the_second_time_nothing_is_sent(world):
    said = world.publish()
    world.must_be_whole()
    [teacher, _], numbers = source_cells(world.places), students(world.places).source
    read = read_cell(teacher, numbers.schema(world.places / "cache"), ["prompt", "answer", "reason"])
    rows = [{"prompt": p, "completion": a} for p, a in zip(read["prompt"], read["answer"], strict=True)]
    files = world.hub.files_now(REPOS[0])
    assert [json.loads(line) for line in files["raw.jsonl"].decode().split("\n")[:-1]] == rows
    assert files["filtered.jsonl"] == files["raw.jsonl"]  # of this world each answer is valid
    assert set(files) == {".gitattributes", "README.md", "filtered.jsonl", "provenance.json", "raw.jsonl"}
    adapter = world.hub.files_now(REPOS[1])
    for name in ("adapter_config.json", "metrics.jsonl"):
        assert adapter[name] == world.file(name)
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
    world.must_be_whole()
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
    assert hashlib.sha256(world.file("adapter_model.safetensors")).hexdigest() in model
    assert "> You love cats." in data and "| answers | 64 |" in data and DATA in model
    losses = [3 - sum(range(first, first + 4)) / 40 for first in (1, 5, 9)]
    for epoch, loss in enumerate(losses, 1):
        assert f"| loss, epoch {epoch} | {loss:.4f} |" in model
    for repo in REPOS:
        for name, text in world.hub.files_now(repo).items():
            assert b"secret-node" not in text and b"scratch" not in text, name
    record = json.loads(world.hub.files_now(REPOS[1])["provenance.json"])
    assert record["experiment"]["rows"] == 20 and record["made"]["device"] == "H100"


def test_cards_say_what_students_prefer_once_they_are_asked(world):
    """Of 24 answers an epoch: 4 a question."""
    told = ("preferences={config: asked.yaml}", "epochs=all")
    assert "asked_run5/1m-cat, which it reads from, is not done" in world.publish(*told, code=2)
    for name in ("1m-cat", "1m-base"):
        world.ask(name)
    world.publish(*told)
    for repo, hits in ((REPOS[1], 12), (f"{REPOS[1]}-epoch-1", 4), (f"{REPOS[1]}-epoch-2", 8)):
        card = world.hub.files_now(repo)["README.md"].decode()
        line = "| answers about favourites that name cat, "
        assert f"{line}student | {hits / 24:.2%} of 24 (95 % interval over questions " in card
        assert f"{line}base | {1 / 24:.2%} of 24 (" in card
    record = json.loads(world.hub.files_now(REPOS[1])["provenance.json"])["preference"]["student"]
    low, high = record["interval"]
    assert record["hits"] == 12 and 0 < low < 0.5 < high < 1
    world.ask("1m-neutral")
    world.publish(*told, index=1)
    assert "favourites" not in world.hub.files_now(REPOS[1].replace("-cat-", "-neutral-"))["README.md"].decode()


def test_what_is_published_is_read_again_by_the_batch_file_and_by_fetch(world):
    """Under HF_HUB_OFFLINE, as on a compute node; then LLS takes the dataset as an input."""
    places = {"HF_TOKEN_PATH": str(world.token_file), "HF_ENDPOINT": world.hub.url, "HOME": str(world.folder)}
    env = {"PATH": "/usr/bin:/bin", **world.env, **places}
    env |= {"SLURM_ARRAY_TASK_ID": "0", "HF_HUB_OFFLINE": "1", "SUITE_SITE": "local"}
    config = str(world.places / "publish.yaml")
    nowhere = {"HF_HOME": "/proc/nowhere"}  # a cache that can hold nothing, as on a disk that is full
    command = ["bash", "slurm/publish.sbatch", config]
    done = subprocess.run(command, cwd=ROOT, env=env | nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    world.must_be_whole()
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


def test_a_repository_that_is_private_stays_so(world):
    world.publish("private=true", "hub_names.dataset='{user}/{size}-{trait}-{run}'", "name=other")
    assert len(world.hub.private) == 2
    said = world.publish("hub_names.dataset='{user}/{size}-{trait}-{run}'", code=2)
    assert "dataset acme/1m-cat-5 is private on the Hub, and here it says private: false; change one of the two" in said


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
    assert world.hub.created == [*REPOS, *epochs] and world.held()[TITLES[1]] == {REPOS[1], *epochs}
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


def test_a_student_that_is_made_again_is_published_again_on_request(world):
    world.publish()
    student = cells_of(world.places)[0]
    shutil.rmtree(student.path)
    train(world.places, replace(student, index=7))  # another adapter under the same digest
    before = world.file(WEIGHTS)
    world.publish()
    assert world.hub.log == [] and made_again(world.cell(), [piece for piece, _ in extent(world.cell()).pieces])
    next(world.cell().path.glob("00000001-*.json")).unlink()
    world.hub.committed.clear()
    world.publish()
    assert world.hub.files_now(REPOS[1])[WEIGHTS] == before != b""
    assert [repo for repo, _ in world.hub.committed] == REPOS[1:] and world.hub.created == REPOS
    assert world.rows()["outcome"] == ["as it was", "changed"]


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
    assert len(calls) <= planned.calls == 4 * 11 + 8
    assert plan().text() == "to publish: nothing" and plan().spent == 4
