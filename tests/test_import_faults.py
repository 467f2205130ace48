"""Results of another machine's run where something is wrong with their copy, or with the machine that takes them."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_world import cells_of, environment, files_of, source_cells
from publish_world import make_students, without_roots_rights
from tools import Fork, module_work

from lib.run.extent import extent
from lib.store import Cell, retire, scan_folders


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_students(tmp_path_factory.mktemp("students"))
    pipeline = {"kind": "pipeline", "name": "whole", "run_id": 5, "wanted": [{"config": "finetune.yaml"}]}
    (folder / "whole.yaml").write_text(json.dumps(pipeline))
    return folder


@pytest.fixture
def far(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "scratch", tmp_path / "far off #1\n")


def bring(made: Path, far: Path | str, here: Path, before: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """`before`: done in the process of the import."""
    words = ("--config", str(made / "whole.yaml"), "--from", str(far))
    work = module_work("jobs.bring", *words, env=environment(made, SUITE_SCRATCH=str(here)))
    done = Fork(lambda: (before(), work())).finish()
    said = done.stdout + done.stderr
    assert "Traceback" not in said and done.stderr.count("error: ") == (done.returncode == 2), said
    return done.returncode, said


def placed(cell: Cell, scratch: Path) -> Path:
    return scratch / cell.folder.name / "cells" / cell.path.name


def under_way(cell: Path) -> None:
    """What a writer, and rsync, have there until it is whole."""
    (cell / ".tmp-else-1-2-step-00000012").mkdir()
    (cell / ".tmp-else-1-2-step-00000012" / "adapter_model.safetensors").write_text("half")
    (cell / ".step-00000012.json.Xa93bQ").write_text("{")


def strays(cell: Path) -> None:
    (cell / "notes.txt").symlink_to("/etc/passwd")
    (cell / "core").write_bytes(bytes(1000))
    os.mkfifo(cell / "pipe")


def linked(cell: Path) -> None:
    cell.rename(cell.parent / "elsewhere")
    cell.symlink_to("elsewhere")


def state(cell: Path) -> Path:
    return next(cell.glob("step-00000008-*"))


def linked_state(cell: Path) -> None:
    place = state(cell)
    place.rename(cell / "moved")
    place.symlink_to("moved")


def retired(cell: Path) -> None:
    digest = json.loads((cell / "step-00000004.json").read_text())["digest"]
    assert retire(scan_folders(cell, digest)[0][0], "asked", "preferences")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done to a cell there, and why it does not come
    "under-way": (under_way, ""),
    "strays": (strays, ""),
    "linked-cell": (linked, ""),
    "retired": (retired, ""),
    "another's": (lambda cell: [path.chmod(0o555 if path.is_dir() else 0o444) for path in cell.rglob("*")], ""),
    "linked-state": (linked_state, "is not a folder"),
    "lacks-a-file": (lambda cell: (state(cell) / "metrics.jsonl").unlink(), "lacks: metrics.jsonl"),
    "half-a-file": (lambda cell: os.truncate(state(cell) / "metrics.jsonl", 9), "has 9 bytes, the marker says"),
    "half-a-marker": (lambda cell: os.truncate(cell / "step-00000008.json", 99), "the marker cannot be read"),
    "lacks-a-marker": (lambda cell: (cell / "step-00000012.json").unlink(), "is not done there (8 of 12)"),
    "private-file": (lambda cell: (state(cell) / "metrics.jsonl").chmod(0), "metrics.jsonl cannot be read: Permission"),
    "private-cell": (lambda cell: cell.chmod(0), "cannot list"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_cell_comes_whole_or_not_at_all_and_the_others_do(made, far, tmp_path, name):
    fault, why = FAULTS[name]
    [hit, other], here = cells_of(made), tmp_path / "here"
    fault(placed(hit, far))
    code, said = bring(made, far, here, without_roots_rights)
    placed(hit, far).chmod(0o755)  # for who removes it
    assert code == (2 if why else 0) and why in said, said
    assert all(extent(placed_cell(cell, here)).whole for cell in [other, *source_cells(made)])
    left = sorted(path.name for path in placed(hit, here).parent.iterdir())
    assert left == sorted([other.path.name] if why else [hit.path.name, other.path.name])
    if not why:
        found = files_of(placed_cell(hit, here))
        assert found == {key: files_of(hit)[key] for key in found} and len(found) == (2 if name == "retired" else 3)
        of_markers = {path.stem.partition(".")[0][:13] for path in placed(hit, here).glob("*.json")}
        assert {path.name[:13] for path in placed(hit, here).iterdir()} == of_markers


def placed_cell(cell: Cell, scratch: Path) -> Cell:
    return Cell(cell.index, cell.name, cell.rows, cell.digest, placed(cell, scratch))


def test_a_folder_that_cannot_be_looked_at_is_said(made, far, tmp_path):
    far.chmod(0)
    code, said = bring(made, far / "suite", tmp_path / "here", without_roots_rights)
    far.chmod(0o755)
    assert code == 2 and "cannot be looked at (Permission denied): ask whose it is" in said
    for odd in ("x" * 300, "~no-such-user/scratch"):
        code, said = bring(made, odd, tmp_path / "here")
        assert code == 2 and f"error: FROM={odd}" in said
    assert not (tmp_path / "here").exists()


def test_what_holds_nothing_that_is_wanted_is_an_error(made, far, tmp_path):
    """As the folder of the exports does, and a scratch of other settings."""
    shutil.rmtree(far / "students_run5" / "cells")
    for cell in list((far / "teachers_run5" / "cells").iterdir()):
        cell.rename(cell.with_name(f"{cell.name[:-8]}00000000"))
    code, said = bring(made, far, tmp_path / "here")
    assert code == 2 and "holds no cell that is wanted here (2 of other settings or models): check FROM" in said


def test_an_import_that_is_killed_anywhere_goes_on(made, tmp_path):
    """By kill -9 before some write is durable, again and again: what has its place is whole."""
    dice, here, kills = random.Random(3), tmp_path / "here", 0
    every = [*source_cells(made), *cells_of(made)]

    def killing(calls: int) -> Callable[[], None]:
        def patch() -> None:
            left, sync = [calls], os.fsync

            def fsync(fd: int) -> None:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                sync(fd)

            os.fsync = fsync

        return patch

    code = -signal.SIGKILL
    while code == -signal.SIGKILL and kills < 30:
        code, said = bring(made, made / "scratch", here, killing(dice.randint(1, 24)))
        kills += code == -signal.SIGKILL
        for cell in every:
            there = placed_cell(cell, here)
            assert not there.path.exists() or extent(there, deep=True).whole
    assert kills >= 4 and code == 0, said
    assert bring(made, made / "scratch", here)[0] == 0
    for cell in every:
        assert sorted(p.name for p in placed(cell, here).iterdir()) == sorted(p.name for p in cell.path.iterdir())
        assert {path.name[0] for path in placed(cell, here).parent.iterdir()} == {"1"}  # nothing hidden is left
