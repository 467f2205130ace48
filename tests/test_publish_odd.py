"""Publishing beside a disk, a token, a clock and a Hub that are not as they should be."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from fake_hub import Fault
from finetune_world import cells_of, last_folder
from publish_world import REPOS, TITLES, World, fixtures, without_roots_rights
from tools import in_fork

from lib.base import atomic
from lib.publish.ledger import DAY, Ledger
from lib.publish.wire import asked_seconds
from lib.store.markers import sweep

made, world = fixtures()


def refused(world: World, before: Callable[[], object] = lambda: None) -> str:
    """The one sentence of a job that ends with an error."""
    done = world.start(before=before).finish()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return errors[0]


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


TOKENS = {
    "private": (lambda path: path.chmod(0), "cannot be read (Permission denied): log in with"),
    "folder": (folder_instead, "cannot be read (Is a directory): log in with"),
    "bytes": (lambda path: path.write_bytes(b"hf_\xff\xfe"), "cannot be read (UnicodeDecodeError): log in with"),
    "letters": (lambda path: path.write_text("hf_geheimé"), "cannot be read (UnicodeEncodeError): log in with"),
    "empty": (lambda path: path.write_text("\n"), "no token of the Hub in"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_that_cannot_be_read_is_said(world, name):
    spoil, why = TOKENS[name]
    spoil(world.token_file)
    said = refused(world, without_roots_rights)
    assert why in said and str(world.token_file) in said and "geheim" not in said
    assert world.hub.writes == []


def test_a_file_that_cannot_be_read_is_said(world):
    path = last_folder(cells_of(world.places)[0]) / "adapter_model.safetensors"
    path.chmod(0)
    assert f"{path} cannot be read (Permission denied)" in refused(world, without_roots_rights)
    path.chmod(0o644)
    world.publish()
    world.must_be_whole()


@pytest.mark.parametrize("answer", [b"[]", b'{"name": "../acme"}', b'{"orgs": []}', b'{"name": "acme", "orgs": null}'])
def test_a_hub_that_does_not_say_whose_login_it_is(world, monkeypatch, answer):
    monkeypatch.setattr("fake_hub_writes.Writes.on_whoami", lambda handler: handler.send(answer))
    said = refused(world)
    assert "does not say whose login it is; check HF_ENDPOINT" in said or "whose login it is cannot be" in said
    assert not list((world.places / "scratch").glob("*.json"))


@pytest.mark.parametrize(
    "after", ["9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 +2359", "9" * 18]
)
def test_a_wait_without_end_ends_the_task(world, after):
    seconds = asked_seconds(httpx2.Response(429, headers={"Retry-After": after}))
    assert seconds is None or seconds <= 366 * DAY
    world.hub.faults = [Fault("/repos/create", 429, headers={"Retry-After": after})]
    assert "the Hub answered 429" in refused(world) and world.hub.created == []


def test_another_title_is_another_collection(world):
    world.publish()
    with (world.places / "publish.yaml").open("a") as f:
        f.write("hub_names: {datasets: 'numbers of run {run}'}\n")
    world.publish()
    held = world.held()
    assert held["numbers of run 5"] == held[TITLES[0]] == {REPOS[0]}
    for path in (world.places / "scratch" / "hub").glob("acme-out_run5-*.json"):
        path.write_text('{"slug": ["../whoami-v2"], "title": 3}')
    shutil.rmtree(world.cell().path)
    world.publish()
    assert world.held() == held and len(world.hub.collections) == 3


def test_who_is_days_ahead_does_not_forget_what_the_others_did(tmp_path, monkeypatch):
    """By the disk's clock it is today."""
    book = Ledger(tmp_path / "me.json")
    assert book.take("new", 1, DAY, what="a") == 0.0
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 2 * DAY)
    assert DAY - 60 < book.take("new", 1, DAY, what="b") <= DAY
    monkeypatch.setattr(time, "time", lambda: real() - 2 * DAY)
    assert DAY - 60 < book.take("new", 1, DAY, what="b") <= DAY


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"kind": "new"', "\0" * 4096, "[" * 100_000])
def test_a_ledger_that_is_lost_is_said_and_begun_anew(tmp_path, capsys, text):
    (tmp_path / "me.json").write_text(text)
    book = Ledger(tmp_path / "me.json")
    assert book.take("new", 1, DAY, what="a") == 0.0
    assert capsys.readouterr().out.count(f"{book.path} is broken: what was asked of the Hub before") == 1
    assert book.take("new", 1, DAY, what="b") > 0


def test_a_ledger_that_cannot_be_read_is_left_as_it_is(world):
    world.publish("what=[datasets]")
    path = world.places / "scratch" / "hub" / "acme.json"
    before = path.read_bytes()
    path.chmod(0)
    assert f"{path}, where what is asked of the Hub is noted, cannot be read" in refused(world, without_roots_rights)
    assert path.read_bytes() == before


def test_a_ledger_whose_writer_is_killed_anywhere_keeps_what_it_had(tmp_path):
    """By kill -9 at each call that changes what is on the disk: the lock's, the clock's and the ledger's own."""
    book = Ledger(tmp_path / "me.json")
    assert book.take("new", 10**6, DAY, 7) == 0.0
    calls, code = 0, -signal.SIGKILL

    def take() -> None:
        left = [calls]
        for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "link"):

            def killing(*words: object, real: Callable = getattr(os, name), **more: object) -> object:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*words, **more)

            setattr(os, name, killing)
        assert book.take("new", 10**6, DAY, 1) == 0.0

    noted = [book.spent("new", DAY)]
    while code == -signal.SIGKILL and calls < 100:
        calls += 1
        code = in_fork(take).returncode
        noted.append(book.spent("new", DAY))
        assert noted[-1] - noted[-2] in (0, 1)
    assert code == 0 and calls > 8 and noted[-1] - noted[-2] == 1
    assert noted[-1] >= 8
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["me.json"]


def test_what_kills_left_beside_the_ledger_goes(world):
    place = world.places / "scratch" / "hub"
    place.mkdir()
    done = in_fork(lambda: print(atomic.beside(place / "acme.json").name))
    left = place / done.stdout.strip()
    left.write_text("{")
    world.publish()
    assert left.name.startswith(".tmp-") and not left.exists()
