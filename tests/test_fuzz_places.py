"""The fuzz of what is typed about an experiment, and of what lies on scratch and in the cache (see test_fuzz.py)."""

import json
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
from fuzz_world import World, in_world, look, made_world
from fuzzing import as_nobody, fuzz, json_bytes, misplaced, mutated, word
from test_fuzz import typed
from test_store_lies import LIES, vouch

from lib.cluster import doctor
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.records import read_rows
from lib.run import command
from lib.run.task import task_of


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with made_world() as one:
        yield one


FLAGS = ["--config", "--set", "--index", "--tasks", "--update", "--help", "--", "-x"]


def test_command_lines(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "site", lambda: world.site)
    monkeypatch.setattr(command, "apply", lambda here: None)

    def case(rng: random.Random) -> None:
        words = ["--config", str(world.config)]
        for _ in range(rng.randrange(4)):
            words += rng.choice(
                [
                    [rng.choice(FLAGS)],
                    [word(rng)],
                    ["--index", word(rng)],
                    ["--tasks", word(rng)],
                    [f"max_rows={typed(rng)}"],
                ]
            )
        words += ["--set", word(rng)] if rng.random() < 0.2 else []
        monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
        if rng.random() < 0.5:
            env = word(rng).replace("\0", "").encode("utf-8", "replace").decode()
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", rng.choice([env, "0", "1", "2", "-1", "x", "9" * 30, "1.0"]))
        rng.note = words[2:], os.environ.get("SLURM_ARRAY_TASK_ID")
        try:
            (cell,) = task_of(command.job("compute_lls", "", load, words))
        except SystemExit as e:  # argparse's own: usage, or help
            assert e.code in (0, 2)
            return
        assert cell.index in (0, 1)

    fuzz(0.08, in_world(world, case))


def test_markers_heartbeats_and_records(world: World) -> None:
    files = [p for p in world.tree.files("scratch") if p.suffix == ".json"]

    def case(rng: random.Random) -> None:
        for path in rng.sample(files, rng.choice([1, 1, 2])):
            data = json_bytes(rng, json.loads(path.read_bytes()))
            path.write_bytes(data)
            rng.note = path.name, data[:200]
        look(world)

    fuzz(0.14, in_world(world, case))


def test_shards_and_merged_files(world: World) -> None:
    """Bytes that rotted, and files that are another than their record says though it vouches for their bytes. (Rotten
    bytes that a record vouches for would be a forger's: HDF5 itself can then go round for ever.)"""
    files = [p for p in world.tree.files("scratch") if p.suffix == ".h5"]

    def case(rng: random.Random) -> None:
        path = rng.choice(files)
        if rng.random() < 0.5:
            path.write_bytes(mutated(rng, path.read_bytes()))
            rng.note = path.name
        else:
            rng.note = path.name, rng.choice(list(LIES))
            with h5py.File(path, "a") as f, suppress(KeyError):
                LIES[rng.note[1]][1](f)
            vouch(next(p for p in path.parent.glob("[0-9m]*.json") if path.name in (p.stem + ".h5", file_of(p))), path)
        look(world)

    fuzz(0.06, in_world(world, case))


def file_of(marker: Path) -> str:
    return json.loads(marker.read_bytes()).get("file", "")


def test_folders_where_files_belong(world: World) -> None:
    everything = list(world.tree.was)

    def case(rng: random.Random) -> None:
        path = rng.choice(everything)
        rng.note = path.relative_to(world.folder), misplaced(rng, path)
        for one in (world.folder / "scratch").rglob("*"):
            os.chown(one, 65534, 65534, follow_symlinks=False)
        with as_nobody():
            look(world)
            experiment = load(world.config)
            doctor.lost_bytes(experiment, world.cache)
            doctor.models_line(experiment, world.cache, deep=True)
            read_rows(world.cache, experiment.input_of(world.cache, "cat"))
        fetch(experiment, world.cache)
        look(world)

    fuzz(0.1, in_world(world, case))
