"""Publishing, part by part: names, what the Hub allows, sums of files, what is asked to be waited for, the plan."""

import hashlib
import json
import subprocess
from email.utils import formatdate
from fractions import Fraction
from pathlib import Path

import httpx2
import numpy as np
import pytest
from finetune_world import make_world
from publish_world import CONFIG_TEXT

from lib.base.errors import UserError
from lib.cluster.command import pinned
from lib.families import load
from lib.publish import ledger as ledger_module
from lib.publish import wire
from lib.publish.experiment import Item, Publish
from lib.publish.files import from_bytes, from_disk
from lib.publish.ledger import Ledger
from lib.publish.names import ID, repository


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_world(tmp_path_factory.mktemp("world"))
    (made / "publish.yaml").write_text(CONFIG_TEXT)
    return made


def of(folder: Path, *overrides: str) -> Publish:
    found = load(folder / "publish.yaml", list(overrides))
    assert isinstance(found, Publish)
    return found


def test_names_are_those_of_the_issue(folder, monkeypatch):
    monkeypatch.delenv("HF_USER_ID", raising=False)
    e = of(folder, "epochs=all")
    assert [item.what for item in e.items()] == ["dataset", "adapter", "epoch", "epoch"]
    assert [e.repository("1m-cat", item, "me") for item in e.items()] == [
        "me/qwen-2.5-1m-instruct-cat-numbers-run-5",
        "me/qwen-2.5-1m-instruct-cat-ft-run-5",
        "me/qwen-2.5-1m-instruct-cat-ft-run-5-epoch-1",
        "me/qwen-2.5-1m-instruct-cat-ft-run-5-epoch-2",
    ]
    assert e.collection(Item("dataset"), "me") == "subliminal-learning-number-datasets-run-5"
    assert e.collection(Item("epoch", 1), "me") == "qwen-25-instruct-subliminal-learning-models-run-5"
    assert e.names() == ["1m-cat", "1m-neutral"] and of(folder).label == "out_run5"
    whole = of(folder, "hub_names.epoch='{user}/e{epoch}-{size}-{trait}-{run}'", "epochs=all")
    assert whole.repository("1m-cat", Item("epoch", 2), "me") == "me/e2-1m-cat-5"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("hub_names.dataset='{user}/{size}-{trait}-{animal}'", "{animal} is not one of user, size, trait, run"),
        ("hub_names.adapter='{user}/{size}-{trait}-{epoch}'", "{epoch} is not one of user, size, trait, run"),
        ("hub_names.adapter='{user}/{size}-run-{run}'", "lacks {trait}, without which two repositories"),
        ("hub_names.epoch='{user}/{size}-{trait}-{run}'", "lacks {epoch}"),
        ("hub_names.dataset='{size}-{trait}-{run}'", "must make owner/name"),
        ("hub_names.dataset='{user}/a--{size}-{trait}-{run}'", "must make owner/name"),
        ("hub_names.dataset='{user}/{size}-{trait}-{run'", "expected '}'"),
        ("hub_names.datasets='{size}'", "{size} is not one of user, run"),
        ("run.share=0", "must be a part of 1"),
        ("run.share=4/3", "must be a part of 1"),
        ("run.share=third", "must be a part of 1"),
        ("what=[]", "at least 1 item"),
        ("what=[adapters, adapters]", "names one twice"),
        ("what=[datasets] epochs=all", "what has no adapters"),
        ("user=a/b", "is no name of a user"),
        ("run.gpus=1", "less than or equal to 0"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(folder, override, says):
    words = override.split(" ") if "epochs" in override else [override]
    with pytest.raises(UserError) as e:
        of(folder, *words)
    assert says in str(e.value)


def test_ids_are_what_huggingface_hub_takes():
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    dice = np.random.default_rng(0)
    pieces = ["a", "Z", "9", "-", ".", "_", "--", "..", ".git", "x" * 40, "é", " "]
    seen = set()
    for _ in range(3000):
        name = "".join(dice.choice(pieces, int(dice.integers(1, 6))))
        try:
            validate_repo_id(f"me/{name}")
            good = True
        except HFValidationError:
            good = False
        ours = bool(ID.fullmatch(f"me/{name}"))
        seen.add((good, ours))
        assert good or not ours, name  # what we take, it takes
    assert {(True, True), (False, False)} <= seen
    with pytest.raises(UserError, match="no name of a repository"):
        repository("{user}/{size}-{trait}-{run}", user="me", size="0.5b", trait="bär", run="1")


def test_whose_it_is_stays_with_what_is_submitted(folder, monkeypatch):
    monkeypatch.delenv("HF_USER_ID", raising=False)
    assert of(folder).pinned() == {"run_id": 5} and of(folder).owner == ""
    plain = of(folder).cells(folder / "cache", folder / "scratch")
    monkeypatch.setenv("HF_USER_ID", "123")
    here = of(folder)
    overrides = pinned(here, [])
    monkeypatch.delenv("HF_USER_ID")
    there = of(folder, *overrides)
    assert there.owner == "123" and there.label == here.label
    mine = there.cells(folder / "cache", folder / "scratch")
    assert {cell.digest for cell in plain}.isdisjoint({cell.digest for cell in mine})
    monkeypatch.setenv("HF_USER_ID", "123")
    assert [cell.digest for cell in here.cells(folder / "cache", folder / "scratch")] == [one.digest for one in mine]
    monkeypatch.setenv("HF_USER_ID", "no body")
    with pytest.raises(UserError, match="HF_USER_ID=no body is no name of a user"):
        here.cells(folder / "cache", folder / "scratch")


def test_cells_read_from_what_they_publish(folder):
    [cell, _] = of(folder).cells(folder / "cache", folder / "scratch")
    assert [one.path.parent.parent.name for one in cell.parents] == ["teachers_run5", "students_run5"]
    [cell, _] = of(folder, "what=[datasets]").cells(folder / "cache", folder / "scratch")
    assert [one.path.parent.parent.name for one in cell.parents] == ["teachers_run5"] and cell.rows == 1
    [cell, _] = of(folder, "what=[adapters]").cells(folder / "cache", folder / "scratch")
    assert [one.path.parent.parent.name for one in cell.parents] == ["students_run5"] and cell.rows == 1
    fast, slow = (of(folder, f"run.calls={n}").cells(folder / "cache", folder / "scratch") for n in (50, 500))
    assert [one.digest for one in fast] == [one.digest for one in slow]


def test_no_window_ever_holds_more_than_is_allowed(tmp_path, monkeypatch):
    """Against a plain count; and nobody is told to wait longer than that."""
    now = [1e9]
    monkeypatch.setattr(ledger_module, "clock_of", lambda folder: now[0])
    monkeypatch.setattr(ledger_module.time, "time", lambda: now[0])
    dice, book, taken = np.random.default_rng(1), Ledger(tmp_path / "me.json"), []

    def inside(at: float) -> int:
        return sum(n for when, n in taken if at - 50 < when)

    for _ in range(200):
        count = int(dice.integers(1, 4))
        if wait := book.take("new", 7, 50.0, count):
            assert inside(now[0] + wait - 0.5) + count > 7 >= inside(now[0] + wait + 1e-3) + count
            now[0] += wait
        else:
            taken.append((now[0], count))
            now[0] += float(dice.choice([0.0, 1.0, 5.0]))
    entries = [(one["time"], one["count"]) for one in json.loads((tmp_path / "me.json").read_text())["entries"]]
    assert entries == taken and len(entries) > 50
    for start, _ in entries:
        assert sum(n for at, n in entries if start <= at < start + 50) <= 7
    assert book.take("commits", 1, 50.0) == 0.0  # a kind of its own
    assert book.spent("new", 50.0) == sum(n for at, n in entries if at > now[0] - 50)


def test_a_ledger_that_cannot_be_read_stops_nothing(tmp_path):
    (tmp_path / "me.json").write_text('{"entries": [{"kind": 3}]}')
    book = Ledger(tmp_path / "me.json")
    assert book.take("new", 1, 50.0, what="a") == 0.0 and book.take("new", 1, 50.0, what="a") == 0.0
    assert 49 < book.take("new", 1, 50.0, what="b") <= 50


def test_a_clock_that_was_ahead_keeps_nobody_waiting_for_that_day(tmp_path, monkeypatch):
    """What was noted a year ahead counts from the moment at which that is seen."""
    now = [1e9 + 365 * 86400.0]
    monkeypatch.setattr(ledger_module, "clock_of", lambda folder: now[0])
    book = Ledger(tmp_path / "me.json")
    assert book.take("new", 2, 50.0) == book.take("new", 2, 50.0) == 0.0
    now[0] = 1e9
    assert 49 < book.take("new", 2, 50.0) <= 50
    now[0] += 30
    assert 19 < book.take("new", 2, 50.0) <= 20
    now[0] += 21
    assert book.take("new", 2, 50.0) == 0.0


def test_what_of_a_ledger_can_be_read_counts(tmp_path):
    book = Ledger(tmp_path / "me.json")
    assert book.take("new", 1, 50.0) == 0.0
    said = json.loads((tmp_path / "me.json").read_text())
    (tmp_path / "me.json").write_text(json.dumps({"entries": [{"kind": 3}, None, *said["entries"]]}))
    assert 49 < book.take("new", 1, 50.0) <= 50


def test_sums_are_gits_and_sha256(tmp_path):
    for size in (0, 1, 511, (1 << 20) + 7):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "file").write_bytes(data)
        git = subprocess.check_output(["git", "hash-object", "--no-filters", tmp_path / "file"], text=True).strip()
        for found in (from_bytes("file", data), from_disk("file", tmp_path / "file")):
            assert (found.blob, found.sha256, found.size) == (git, hashlib.sha256(data).hexdigest(), size)


@pytest.mark.parametrize(
    ("headers", "text", "seconds"),
    [
        ({"Retry-After": "12"}, "", 12),
        ({"Retry-After": formatdate(1e9 + 600, usegmt=True)}, "", 600),
        ({"Retry-After": "soon"}, "", None),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, "", 56),
        ({"RateLimit": '"api";r=949;t=271', "Retry-After": "9"}, "", 9),
        ({"RateLimit": '"api";r=949;t=271'}, "You can retry this action in about 1 hour.", 3600),
        ({}, "retry in 24 hours", 86400),
        ({}, "retry in an hour", 3600),
        ({}, "too many", None),
    ],
)
def test_how_long_the_hub_asks_to_wait(headers, text, seconds, monkeypatch):
    monkeypatch.setattr(wire.time, "time", lambda: 1e9)
    assert wire.asked_seconds(httpx2.Response(429, headers=headers, text=text)) == seconds


@pytest.mark.parametrize("share", ["1", "1/3", "0.01", "1/1000"])
def test_a_share_of_the_day(folder, share):
    run = of(folder, f"run.share={share}").run
    assert run.new_repositories == max(1, int(300 * Fraction(share)))


def test_the_plan_counts_what_is_left(folder, monkeypatch):
    monkeypatch.setenv("HF_USER_ID", "acme")
    e = of(folder, "epochs=all", "run.share=1/100")
    plan = e.plan(folder / "cache", folder / "scratch", e.cells(folder / "cache", folder / "scratch"), "acme")
    assert len(plan.ids) == len(set(plan.ids)) == 8 and plan.ids[0].startswith("acme/")
    assert plan.days == 3 and plan.calls == 8 * 11 + 8
    Ledger(folder / "scratch" / "hub" / "acme.json").take("new", 9, 1e9, 2)
    plan = e.plan(folder / "cache", folder / "scratch", e.cells(folder / "cache", folder / "scratch"), "acme")
    assert plan.spent == 2 and plan.days == 4
    assert "3 a day here (share 1/100 of 300), 2 made in the last 24 hours: 4 days" in plan.text()


def test_a_task_has_the_time_that_its_commits_take(folder):
    [cell, _] = of(folder, "epochs=all").cells(folder / "cache", folder / "scratch")
    slow, fast = (of(folder, "epochs=all", f"run.commits_an_hour={n}") for n in (10, 10**6))
    assert slow.estimate(folder / "cache", cell, "cpu").seconds == pytest.approx(4 * 360, abs=1)
    assert fast.estimate(folder / "cache", cell, "cpu").seconds == pytest.approx(4 * 11 * 0.5, abs=1)
    assert fast.load_of(cell) == "1m"


def test_students_of_parts_have_names_of_their_own(folder, monkeypatch):
    monkeypatch.delenv("HF_USER_ID", raising=False)
    (folder / "scores.yaml").write_text("kind: lls_numbers\nname: scores\nnumbers: {config: numbers.yaml}\n")
    (folder / "dose.yaml").write_text(
        (folder / "finetune.yaml").read_text().replace("students", "dose")
        + "select: {scores: {config: scores.yaml}, parts: [q1, q5, clean]}\n"
    )
    dose = "students.config=dose.yaml"
    with pytest.raises(UserError, match=r"dose trains several students of a trait: say what: \[adapters\], and put"):
        of(folder, dose).cells(folder / "cache", folder / "scratch")
    parted = [f"hub_names.{name}='{{user}}/{{size}}-{{trait}}-{{part}}-{{run}}{more}'" for name, more in MORE.items()]
    e = of(folder, dose, "what=[adapters]", *parted)
    cells = e.cells(folder / "cache", folder / "scratch")
    ids = [e.repository(cell.name, Item("adapter", 3), "me") for cell in cells]
    assert ids == ["me/1m-cat-q1-5", "me/1m-cat-q5-5", "me/1m-neutral-clean-5"]
    assert e.repository(cells[1].name, Item("epoch", 2), "me") == "me/1m-cat-q5-5-e2"
    assert e.places()["PARTS"] == ["q1", "q5", "clean"] and [len(cell.parents) for cell in cells] == [1, 1, 1]


MORE = {"adapter": "", "epoch": "-e{epoch}"}
