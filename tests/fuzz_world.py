"""What the fuzz of things on disk needs: an experiment with all that lies around it, put back after a case."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from test_store_lies import SCHEMA
from tools import small_lls

from lib.base.atomic import remove
from lib.cluster.show import table as status_table
from lib.cluster.status import status
from lib.families import load
from lib.run.command import Job
from lib.run.site import Site
from lib.store import Cell, commit, commit_folder, gaps, merge, scan, scan_folders
from lib.store.markers import set_aside, sweep
from lib.store.merge import merged_is_current

ROWS = 6


class Tree:
    """A folder that is put back as it was, times and modes too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.was = {p: (p.lstat(), p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}

    def files(self, under: str = "") -> list[Path]:
        return [p for p, (_, data) in self.was.items() if data is not None and p.is_relative_to(self.folder / under)]

    def restore(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):
            wanted = path in self.was and not path.is_symlink()
            if not wanted or not (path.is_file() if self.was[path][1] is not None else path.is_dir()):
                remove(path)
        for path, (stat, data) in self.was.items():
            if data is None:
                path.mkdir(exist_ok=True)
            elif (
                not path.is_file() or path.stat().st_mtime_ns != stat.st_mtime_ns or path.stat().st_mode != stat.st_mode
            ):
                path.write_bytes(data)
            os.chown(path, stat.st_uid, stat.st_gid)
            path.chmod(stat.st_mode)
        for path, (stat, _) in reversed(self.was.items()):
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@dataclass
class World:
    """An experiment with its model, rows, fetched cache, and scratch with what a job and its submission left."""

    folder: Path
    site: Site
    config: Path
    tree: Tree = field(init=False)
    digests: list[str] = field(init=False)

    @property
    def cache(self) -> Path:
        return self.site.cache

    def job(self, index: int = 0) -> Job:
        return Job(load(self.config), self.config, self.site, index, "", False)

    def cells(self) -> list[Cell]:
        return load(self.config).cells(self.site.cache, self.site.scratch)


@contextmanager
def made_world() -> Iterator[World]:
    outer = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/tmp"))  # whose parents others may enter
    folder, before, here = outer / "world", dict(os.environ), Path.cwd()
    for path in (outer, folder):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    os.chdir(outer)
    config = small_lls(folder, "cat", "dog", rows=ROWS)
    (folder / "model" / "model.safetensors").chmod(0o644)  # written 0600
    env = {"PATH": os.environ["PATH"], "SUITE_SLURM": "no", "SUITE_SITE": "local"}
    site = Site("local", folder / "scratch", folder / "cache", folder / "outputs", 4, "cpu", env)
    os.environ |= {"SLURM_TMPDIR": str(folder / "node"), "SUITE_GPU": "cpu"}
    (folder / "node").mkdir()
    one = World(folder, site, config)
    _worked(one)
    one.tree, one.digests = Tree(folder), [cell.digest for cell in one.cells()]
    yield one
    os.environ.clear()
    os.environ.update(before)
    os.chdir(here)
    shutil.rmtree(outer)


def columns(start: int, stop: int) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    n = np.arange(ROWS, dtype=np.int32) % 3
    every = {"row": np.arange(ROWS, dtype=np.int32), "n": n, "x": rng.normal(size=ROWS)}
    every["status"] = np.zeros(ROWS, np.uint8)
    edges = np.concatenate([[0], np.cumsum(n)])
    flat = rng.normal(size=edges[-1]).astype(np.float32)
    return {k: v[start:stop] for k, v in every.items()} | {"t": flat[edges[start] : edges[stop]]}


def _worked(world: World) -> None:
    """Shards, a folder piece, a merged file, heartbeats, a record of a submission."""
    for cell in world.cells():
        made = {"attempt": "a", "job": "7_0", "host": "h", "gpus": 1, "versions": {"torch": "2"}}
        for start, stop in ((0, 4), (4, ROWS)):
            about = {"seconds": 1.5, "made": made, "facts": {"rows_apart": 1}}
            commit(cell.path, cell.digest, start, stop, SCHEMA, columns(start, stop), **about)
        merge(cell, SCHEMA, "{}")
        commit_folder(cell.path, cell.digest, "page", lambda f: [(f / n).write_text(n) for n in ("a", "b")] and None)
        tasks, records = cell.path.parent.parent / "tasks", cell.path.parent.parent / "submissions"
        for folder in (tasks, records):
            folder.mkdir(exist_ok=True)
        beat = {"cell": cell.name, "digest": cell.digest, "state": "running", "started": 1.0, "updated": 2.0, "job": ""}
        beat |= {"host": "elsewhere", "node": "n1", "pid": 5, "pid_started": "77", "log": "x.out", "error": ""}
        (tasks / f"{cell.name}-7.json").write_text(json.dumps(beat))
        record = {"job": "7", "array": "0-1", "config": str(world.config), "overrides": [], "time": 5.0}
        (records / "7.json").write_text(json.dumps(record))


def in_world(world: World, case: Callable[[random.Random], object]) -> Callable[[random.Random], object]:
    """Puts all back after a case, and looks whether something lies where it should not."""

    def run(rng: random.Random) -> object:
        try:
            return case(rng)
        finally:
            here = set(world.folder.iterdir())
            world.tree.restore()
            assert here <= set(world.folder.iterdir()), f"made {here}"
            assert list(world.folder.parent.iterdir()) == [world.folder]

    return run


def look(world: World) -> None:
    """Status, plan and merge, as a user would type them; merged rows are those that were put in."""
    cells = world.cells()
    assert [cell.digest for cell in cells] == world.digests
    now = status("small", cells)
    json.dumps(now.json(), allow_nan=False).encode()
    status_table(now, "CONFIG=x", ("submit-lls", "export-lls")).encode()
    assert all(0 <= c.done <= c.rows for c in now.cells)
    for cell in cells:
        done, bad = scan(cell.path, cell.digest, deep=True, schema=SCHEMA, rows=cell.rows)
        scan_folders(cell.path, cell.digest, deep=True)
        sweep(cell.path)
        if gaps(done, cell.rows):
            set_aside(bad)
        elif not merged_is_current(cell, SCHEMA):
            merge(cell, SCHEMA, "{}")
            assert merged_is_current(cell, SCHEMA)
        if merged_is_current(cell, SCHEMA):
            with h5py.File(cell.path / "merged.h5") as f:
                for name, values in columns(0, ROWS).items():
                    assert np.array_equal(f[name][:], values), name
