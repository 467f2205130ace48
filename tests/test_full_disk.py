"""A disk that is full, by the kernel's own word, at the stages of what is exported, shown, imported and published: one
sentence names the fix, nothing is half there, and the same command goes through once there is room."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_hub import serve
from finetune_world import environment
from preferences_world import cells_of
from publish_world import World, make_students
from test_store import in_small_mount
from tools import forked

from lib.base.errors import UserError
from lib.families import load
from lib.inputs.hub import _sentences
from lib.run.parents import read_from
from lib.store import commit

PAGE = 4096
# job, configuration, which root is on the full disk, more, and how many pages are free there, try by try
COMMANDS = {
    "numbers": ("export_numbers", "numbers", "output", ("keep=4",), (0, 5)),
    "students": ("export_finetune", "finetune", "output", (), (2, 12)),
    "preferences": ("export_preferences", "asked", "output", (), (10, 30)),
    "report": ("report", "whole", "output", (), (30, 100)),
    "import": ("bring", "whole", "scratch", ("--from", "{folder}/scratch"), (0, 9)),
}
PUBLISH = (0, 2, 5, 9, 10)
TRIES = [(name, pages) for name, (*_, tries) in COMMANDS.items() for pages in tries]
Call = Callable[[], tuple[int, str]]


@dataclass
class Seen:
    code: int
    said: str
    half: list[str]  # hidden files and folders
    again: int  # the code, once there is room
    differs: list[str]  # from what an undisturbed call made


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """All tries, by one process for which the folder `small` is a disk of 4 MB."""
    folder = make_world(tmp_path_factory.mktemp("full"))
    code = f"import sys; sys.path.insert(0, 'tests'); from test_full_disk import within; within({str(folder)!r})"
    done = in_small_mount(folder / "small", "size=4m", code)
    assert done.returncode == 0, done.stderr
    return {name: Seen(**one) for name, one in json.loads((folder / "seen.json").read_text()).items()}


def make_world(folder: Path) -> Path:
    """A run that is done."""
    make_students(folder)
    (folder / "small").mkdir()
    wanted = {"kind": "pipeline", "name": "whole", "run_id": 5, "wanted": [{"config": "asked.yaml"}]}
    (folder / "whole.yaml").write_text(json.dumps(wanted))
    words = load(folder / "words.yaml")
    schema = words.schema(folder / "cache")
    for cell in cells_of(folder, "words").values():
        columns = {name: np.full((cell.total, *one.shape), -1, one.dtype) for name, one in schema.items()}
        columns["epoch"][:] = np.repeat(words.epochs_of(cell.name), 6)
        columns["question"][:] = np.tile(range(6), cell.total // 6)
        made = {"rows": cell.total, "parents": read_from(cell)}
        commit(cell.path, cell.digest, 0, cell.total, schema, columns, made=made)
    for name in cells_of(folder, "asked"):
        World.ask(SimpleNamespace(places=folder), name)
    return folder


def within(place: str) -> None:
    folder, found = Path(place), dict[str, Seen]()
    for name, (_, _, root, _, tries) in COMMANDS.items():
        call, there = partial(command, folder, name), folder / "small" / root
        with emptied(there):
            assert call()[0] == 0
            right = sums(there)
        for pages in tries:
            with emptied(there):
                found[f"{name}-{pages}"] = attempt(call, there, pages, partial(sums, there), right)
    with emptied(there := folder / "small" / "scratch"):
        shutil.copytree(folder / "scratch", there)
        fill(folder / "small" / "ballast", 0)
        env = environment(folder, SUITE_SCRATCH=str(there))
        done = forked("jobs.retire_epochs", "--config", str(folder / "asked.yaml"), env=env)
        left = [str(path) for path in there.rglob("step-*/")]
        found["retire"] = Seen(done.returncode, done.stdout, left, 0, [])
        (folder / "small" / "ballast").unlink()
    for pages in PUBLISH:
        there = folder / "small" / "places"
        with serve() as hub, emptied(there):
            shutil.copytree(folder, there, ignore=shutil.ignore_patterns("small", "model-0"))
            world = World(folder, hub, there)
            found[f"publish-{pages}"] = attempt(partial(publish, world), there, pages, partial(on_hub, world), {})
    (folder / "seen.json").write_text(json.dumps({name: asdict(one) for name, one in found.items()}))


def command(folder: Path, name: str) -> tuple[int, str]:
    job, config, root, more, _ = COMMANDS[name]
    words = ("--config", str(folder / f"{config}.yaml"), *(one.format(folder=folder) for one in more))
    env = environment(folder, **{f"SUITE_{root.upper()}": str(folder / "small" / root)})
    done = forked(f"jobs.{job}", *words, env=env)
    return done.returncode, done.stderr


def publish(world: World) -> tuple[int, str]:
    done = world.start().finish()
    return done.returncode, done.stderr


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def attempt(call: Call, place: Path, pages: int, outcome: Callable[[], dict[str, str]], right: dict[str, str]) -> Seen:
    ballast = fill(place.parent / "ballast", pages)
    code, said = call()
    half = [str(path) for path in place.rglob(".tmp-*")]
    ballast.unlink()
    again, more = call()
    differs = sorted({name for name, _ in outcome().items() ^ right.items()})
    return Seen(code, said + more, half, again, differs)


def fill(ballast: Path, pages: int) -> Path:
    """Leave so many pages free."""
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, bytes(PAGE))
    except OSError:
        os.ftruncate(fd, os.fstat(fd).st_size // PAGE * PAGE - pages * PAGE)
    os.close(fd)
    return ballast


def sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def on_hub(world: World) -> dict[str, str]:
    """What is not as it should be."""
    try:
        world.must_be_whole()
    except AssertionError as e:
        return {str(e): ""}
    return {}


@pytest.mark.parametrize(("name", "pages"), TRIES)
def test_an_export_a_page_an_import_on_a_full_disk(seen, name, pages):
    one, root = seen[f"{name}-{pages}"], COMMANDS[name][2]
    errors = [line for line in one.said.splitlines() if line.startswith("error: ")]
    assert one.code == 2 and len(errors) == 1 and "Traceback" not in one.said, one.said
    assert ": No space left on device" in errors[0] and f"or point SUITE_{root.upper()} elsewhere" in errors[0]
    assert (one.half, one.again, one.differs) == ([], 0, [])


def test_epochs_are_retired_on_a_full_disk_which_makes_room(seen):
    """Without a page free: of two students the last epoch of three stays."""
    one = seen["retire"]
    assert one.code == 0 and one.said.splitlines()[-1].startswith("freed ") and "of 2 students" in one.said, one.said
    assert len(one.half) == 2 and all("step-00000012-" in path for path in one.half)


def test_the_hubs_own_cache_on_a_full_disk():
    with pytest.raises(UserError) as e, _sentences("dataset x"), Path("/dev/full").open("wb", buffering=0) as f:
        f.write(b"x")
    assert str(e.value) == (
        "dataset x: No space left on device in HF_HOME; free some, or set SUITE_CACHE to a larger place"
    )


@pytest.mark.parametrize("pages", PUBLISH)
def test_publishing_on_a_full_disk(seen, pages):
    """Its ledger, its locks, its markers, what it notes of a collection."""
    one = seen[f"publish-{pages}"]
    errors = [line for line in one.said.splitlines() if line.startswith("error: ")]
    assert one.code == 2 and len(errors) == 1 and "Traceback" not in one.said, one.said
    assert ": No space left on device" in errors[0] and "or point SUITE_SCRATCH elsewhere" in errors[0]
    assert (one.half, one.again, one.differs) == ([], 0, [])
