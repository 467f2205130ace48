"""Every kind of input, changed at random, through the code that a command runs: right numbers, or one sentence.

The same cases for a seed. `SUITE_FUZZ_CASES=5000 SUITE_FUZZ_SEED=77` runs others, and more of them; what offends is
named with the seed that runs it alone (`-k KIND`)."""

import json
import math
import os
import random
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from fuzzing import as_nobody, changed, fuzz, json_bytes, misplaced, mutated, odd, word
from test_store_lies import LIES, SCHEMA, vouch
from tools import ROOT, number_rows, small_lls

from lib.cluster import doctor, slurm
from lib.cluster.plan import plan, table
from lib.cluster.request import gpus_of, has_features, minutes, requested
from lib.cluster.show import table as status_table
from lib.cluster.status import status
from lib.config.loading import overrides_of
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.records import read_rows
from lib.inputs.samples import Rows, read_samples, samples_input, save_samples
from lib.lls.kernel import load_kernel
from lib.run import command
from lib.run.command import Job
from lib.run.site import Site
from lib.store import Cell, commit, commit_folder, gaps, merge, scan, scan_folders
from lib.store.markers import set_aside, sweep
from lib.store.merge import merged_is_current

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ROWS = 6


class Tree:
    """A folder that is put back as it was, times and modes too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.was = {p: (p.lstat(), p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}

    def files(self, under: str = "") -> list[Path]:
        return [p for p, (_, data) in self.was.items() if data is not None and p.is_relative_to(self.folder / under)]

    def restore(self) -> None:
        from lib.base.atomic import remove

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


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    outer = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/tmp"))  # whose parents others may enter
    folder, before, here = outer / "world", dict(os.environ), Path.cwd()
    for path in (outer, folder):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    os.chdir(outer)
    config = small_lls(folder, "cat", "dog", rows=ROWS)
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


# --- what is typed ---------------------------------------------------------------------------------------------------

KEYS = [
    *("name", "kind", "model", "model.id", "model.revision", "model.dtype", "traits", "system_prompt", "dataset.id"),
    *("dataset.split", "dataset", "base", "date", "max_rows", "score", "score.batch_tokens", "score.max_tokens"),
    *("score.check_every", "run", "run.shard_rows", "run.log_seconds", "run.gpus", "data", "data.general.seeds"),
    *(
        "data.general.tokens",
        "data.prompts",
        "data.prompts.toxic.threshold",
        "data.text",
        "score.layers",
        "score.tokens",
    ),
    *(
        "data.general.id",
        "data.prompts.toxic.id",
        "data.general.config",
        "data.text.split",
        "score.block",
        "max_samples",
    ),
    *("prompts", "more_prompts", "datasets_of", "score.rule", "score.nonfinite", "", ".", "..", "a.b.c.d", "__class__"),
]
YAML_BITS = [
    *("2026-13-01", "!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!python/name:os.system", "!x y", "9" * 5000),
    *(
        "[" * 3000,
        "{a: " * 3000,
        "&a [*a]",
        "*a",
        "<<: 1",
        "? [a]\n: b",
        "- a\n- b",
        "0o9",
        "0b",
        "0x",
        "1:99:99:99",
        "1e5",
    ),
    *(
        "2026-01-01T99:99:99Z",
        "0001-01-01 00:00:00 -23:59",
        ".inf",
        ".nan",
        "-.inf",
        "~",
        "''",
        "|",
        ">",
        "%",
        "@",
        "`",
        "\t",
    ),
    *(
        "!!binary ////x",
        "!!set {a}",
        "!!omap [a: b]",
        "!!pairs x",
        "1" + "_" * 3000,
        "[" + "a, " * 3000 + "]",
        "{1: 2}",
    ),
    *("a: b: c", "--- a\n--- b", "# x", "'", '"', '"\\ud800"', '"\\x00"', '"\\U0001F600"', "- " * 800, "? " * 800),
    *(
        "0" * 70_000 + "1",
        "1e" + "9" * 400,
        "-" + "9" * 4000,
        "0." + "9" * 5000,
        "[[[[1]]]]",
        "12345678901234567890123",
    ),
]


def typed(rng: random.Random) -> str:
    how = rng.randrange(6)
    if how < 2:
        return rng.choice(YAML_BITS)
    if how < 4:
        return json.dumps(odd(rng))
    return word(rng)


def safe(experiment: Any) -> None:
    """What was loaded names folders below its roots, and can be digested and written."""
    assert "/" not in experiment.label and experiment.label not in (".", "..")
    json.loads(experiment.science_json())
    for name in experiment.names():
        assert name and "/" not in name and name.isprintable()
    experiment.cells(Path("/nowhere/cache"), Path("/nowhere/scratch"))


def test_overrides() -> None:
    def case(rng: random.Random) -> None:
        path = rng.choice(CONFIGS)
        given = [f"{rng.choice(KEYS)}={typed(rng)}" for _ in range(rng.choice([1, 1, 2, 3]))]
        if rng.random() < 0.2:
            given[0] = word(rng)
        rng.note = (path.name, [g[:80] for g in given])
        safe(load(path, overrides_of(" ".join(given)) if rng.random() < 0.2 else given))

    fuzz(0.22, case)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip(string.ascii_letters, string.ascii_letters[1:20], strict=False)
)


def test_configuration_files(tmp_path: Path) -> None:
    def case(rng: random.Random) -> None:
        was = rng.choice(CONFIGS).read_bytes()
        plain = yaml.safe_load(was)
        data = rng.choice([
            lambda: mutated(rng, was),
            lambda: mutated(rng, was),
            lambda: yaml.safe_dump(changed(rng, plain)).encode(),
            lambda: json_bytes(rng, plain),
            lambda: BOMB.encode() + was,
            lambda: was + f"more: {rng.choice(YAML_BITS)}\n".encode("utf-8", "replace"),
        ])()  # fmt: skip
        path = tmp_path / "x.yaml"
        path.write_bytes(data)
        rng.note = data[:200]
        if rng.random() < 0.1:
            rng.note = misplaced(rng, path)
        try:
            safe(load(path))
        finally:
            misplaced_away(path)

    fuzz(0.1, case)


def misplaced_away(path: Path) -> None:
    from lib.base.atomic import remove

    remove(path)


FLAGS = ["--config", "--set", "--index", "--expect", "--update", "--help", "--", "-x"]


def test_command_lines(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "site", lambda: world.site)
    monkeypatch.setattr(command, "apply", lambda here: None)

    def case(rng: random.Random) -> None:
        words = ["--config", str(world.config)]
        for _ in range(rng.randrange(4)):
            words += rng.choice([[rng.choice(FLAGS)], [word(rng)], ["--index", word(rng)], [f"max_rows={typed(rng)}"]])
        words += ["--set", word(rng)] if rng.random() < 0.2 else []
        monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
        if rng.random() < 0.5:
            env = word(rng).replace("\0", "").encode("utf-8", "replace").decode()
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", rng.choice([env, "0", "1", "2", "-1", "x", "9" * 30, "1.0"]))
        rng.note = words[2:], os.environ.get("SLURM_ARRAY_TASK_ID")
        try:
            cell = command.job("compute_lls", "", load, words).cell()
        except SystemExit as e:  # argparse's own: usage, or help
            assert e.code in (0, 2)
            return
        assert cell.index in (0, 1)

    fuzz(0.08, in_world(world, case))


# --- what Slurm says -------------------------------------------------------------------------------------------------

R, F = slurm.RECORD, slurm.FIELD
QUEUE = "".join(
    R + F.join(["12", k, s, "None", "n1", "small"]) + "\n" for k, s in (("0", "RUNNING"), ("N/A", "PENDING"))
)
SACCT = "12_0|COMPLETED|65|billing=8,cpu=8,gres/gpu=1|1K|0:0\n12_0.batch|COMPLETED|65||161548K|0:0\n13|FAILED|5|||1:0\n"


def text(rng: random.Random, was: str) -> str:
    return mutated(rng, was.encode()).decode("utf-8", "replace") if rng.random() < 0.8 else word(rng, 400)


def test_what_slurm_answers() -> None:
    def case(rng: random.Random) -> None:
        which = rng.randrange(7)
        said = text(
            rng, [QUEUE, SACCT, "0-14:2%4,17", "2-12:30:59", "161548K", "a&b|(c*4)", "gpu:h200:4(S:0-1)"][which]
        )
        rng.note = which, said
        if which == 0:
            for task in slurm.parse_queue(said):
                assert task.array.isdigit() and (task.index is None or task.index >= 0) and F not in task.state
        elif which == 1:
            for one in slurm.parse_sacct(said).values():
                assert one.elapsed >= 0 and one.gpus >= 0 and math.isfinite(slurm.size(one.max_rss))
        elif which == 2:
            cells = rng.choice([1, 20, 10**6])
            found = slurm.parse_array(said, cells)
            assert found == sorted(set(found)) and all(0 <= i < cells for i in found) and found
            assert slurm.parse_array(slurm.format_array(found), cells) == found
            slurm.throttle_of(said)
        elif which == 3:
            assert minutes(said) >= 0
        elif which == 4:
            assert slurm.size(said) >= 0
        elif which == 5:
            has_features("a,c", said)
        else:
            assert gpus_of(requested("#SBATCH --gres=gpu:1\n", {"SBATCH_GRES": said, "SBATCH_X": said})) >= 0

    fuzz(0.12, case)


# --- what lies on scratch --------------------------------------------------------------------------------------------


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


# --- what was fetched ------------------------------------------------------------------------------------------------


def test_records_of_inputs(world: World) -> None:
    files = world.tree.files("cache")
    rows = [row["messages"] for row in number_rows(ROWS, 0)]

    def case(rng: random.Random) -> None:
        path = rng.choice(files)
        data = path.read_bytes()
        data = json_bytes(rng, json.loads(data)) if path.suffix == ".json" else mutated(rng, data)
        path.write_bytes(data)
        rng.note = path.parent.name, data[:200]
        experiment = load(world.config)
        for deep in (False, True):
            doctor._guarded("models", lambda deep=deep: [doctor.models_line(experiment, world.cache, deep)])
        cells = experiment.cells(world.cache, world.site.scratch)
        made = plan(experiment, cells, world.cache, "cpu")
        table(made, "cpu", 0.5).encode()
        assert all(p.bytes >= 0 and math.isfinite(p.gpu_hours) for p in made)
        if [cell.digest for cell in cells] == world.digests:
            read = read_rows(world.cache, experiment.input_of(world.cache, "cat"))
            assert [row["messages"] for row in read] == rows[: len(read)]

    fuzz(0.1, in_world(world, case))


def test_rows_that_a_user_gives(world: World) -> None:
    path = world.folder / "cat.jsonl"

    def case(rng: random.Random) -> None:
        given = number_rows(3, rng.randrange(100))
        if rng.random() < 0.3:
            given = [{"prompt": m[0]["content"], "completion": m[1]["content"]} for m in (r["messages"] for r in given)]
        lines = [json.dumps(row).encode() for row in given]
        at = rng.randrange(len(lines))
        lines[at] = json_bytes(rng, given[at], indent=None)
        data = rng.choice([b"\n", b"\n", b"\n\n", b"\r\n", b"\x0b"]).join(lines)
        path.write_bytes(mutated(rng, data) if rng.random() < 0.2 else data)
        rng.note = lines[at][:200]
        experiment = load(world.config)
        fetch(experiment, world.cache)
        found = read_rows(world.cache, experiment.input_of(world.cache, "cat"))
        assert [row["messages"] for row in found] == _rows_by_hand(path)
        json.dumps(found).encode()

    fuzz(0.06, in_world(world, case))


def _rows_by_hand(path: Path) -> list[list[dict[str, str]]]:
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
                pair = (("user", row["prompt"]), ("assistant", row["completion"]))
                found.append([{"role": role, "content": content} for role, content in pair])
            else:
                found.append([{"role": m["role"], "content": m["content"]} for m in row["messages"]])
    return found


# --- a model's folder ------------------------------------------------------------------------------------------------

TEMPLATES = [
    *(
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ),
    *("{{ 'x' * 10**10 }}", "{{ messages[0].content * 10**8 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    *(
        "{{ raise_exception('no') }}",
        "{{ x.y.z }}",
        "{{ 1 // 0 }}",
        "{% include 'x' %}",
        "{{ ''.__class__ }}",
        "{{",
        "{% if %}",
    ),
    *(
        "",
        "x",
        "{{ messages }}",
        "{{ messages[0] }}",
        "{{ messages[5].content }}",
        "{{ '\\0' }}",
    ),
    *(
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ messages | tojson }}",
        "{{ '%c' | format(-1) }}",
        "{{ 2 ** 10 ** 9 }}",
    ),
    "{% for m in messages %}<|im_start|>{{ m.content | trim }}{% endfor %}{{ '<|im_start|>' }}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant\n",
]
BESIDE = ["adapter_config.json", "model.safetensors.index.json", "generation_config.json", "special_tokens_map.json"]
BESIDE += ["added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "pytorch_model.bin", "x.safetensors"]


def header_changed(rng: random.Random, data: bytes) -> bytes:
    """Another header before the same weights."""
    size = int.from_bytes(data[:8], "little")
    header = json_bytes(rng, json.loads(data[8 : 8 + size]), indent=None)
    return (
        (len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**40, 2**63])).to_bytes(8, "little")
        + header
        + data[8 + size :]
    )


def other_file(rng: random.Random, path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else rng.choice([b"{}", b"", b"[]", b"x", json.dumps(odd(rng)).encode()])
    if path.suffix == ".jinja" and rng.random() < 0.7:
        return rng.choice(TEMPLATES).encode()
    if path.suffix == ".safetensors" and rng.random() < 0.8 and data[:1]:
        return header_changed(rng, data)
    if path.suffix == ".json" and rng.random() < 0.9:
        with suppress(ValueError):
            return json_bytes(rng, json.loads(data))
    return mutated(rng, data)


def by_hand(world: World) -> list[float]:
    """Log-likelihoods of the answers after the system prompt, by transformers alone in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, experiment = world.folder / "model", load(world.config)
    (folder / "generation_config.json").unlink(missing_ok=True)  # no part of a score
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for row in read_rows(world.cache, experiment.input_of(world.cache, "cat")):
        *turns, answer = row["messages"]
        turns = [{"role": "system", "content": experiment.prompt_for("cat")}, *turns]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head = tokenizer(context, add_special_tokens=False)["input_ids"]
        both = tokenizer(context + answer["content"], add_special_tokens=False)["input_ids"]
        if both[: len(head)] != head:
            both = head + tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([both])).logits[0].log_softmax(-1)
        found.append(float(sum(logp[i - 1, both[i]] for i in range(len(head), len(both)))))
    return found


def test_models(world: World) -> None:
    """Fetched anew, planned, loaded, and scored: as transformers does in float64, or a sentence."""
    folder = world.folder / "model"

    def case(rng: random.Random) -> None:
        path = folder / rng.choice([*sorted(p.name for p in folder.iterdir()), rng.choice(BESIDE)])
        if rng.random() < 0.08:
            rng.note = path.name, misplaced(rng, path)
        else:
            path.write_bytes(other_file(rng, path))
            rng.note = path.name, path.read_bytes()[: 3000 if path.suffix != ".safetensors" else 80]
        experiment = load(world.config)
        fetch(experiment, world.cache)
        doctor.models_line(experiment, world.cache)
        cells = experiment.cells(world.cache, world.site.scratch)
        plan(experiment, cells, world.cache, "cpu")
        kernel, _ = load_kernel(world.job(), experiment, cells[0])
        columns, _ = kernel.compute(kernel.prepare(0, ROWS))
        good = columns["status"] == 0
        assert np.isfinite(columns["system_sum"][good]).all()
        assert np.allclose(columns["system_sum"][good], np.array(by_hand(world))[good], atol=2e-2, rtol=1e-4)

    fuzz(0.06, in_world(world, case))


# --- attribution ---------------------------------------------------------------------------------------------------

SCORES = [
    *("rule=cp_lrp", "rule=gradient", "layers=[all]", "layers=[q_proj]", "layers=[k_proj, v_proj]", "layers=[o_proj]"),
    *("layers=[gate_proj]", "layers=[down_proj]", "layers=[layers.1]", "layers=[x]", "layers=['']", "layers=[layers]"),
    *("layers=[embed_tokens]", "level=weight", "level=weight score.block=1", "wanda=true", "scores=[]", "scores=[abs]"),
    *("target=all", "target=given", "tokens=[5] score.target=given", "tokens=[400000] score.target=given", "block=3"),
    *(
        "batch_tokens=16",
        "batch_tokens=100000",
        "nonfinite=5",
        "store=bfloat16 score.level=weight",
        "wanda=true score.scores=[]",
    ),
]


def test_attributions(world: World) -> None:
    """Sets with any ids and lengths, and any choice of scores: the logit is transformers' own, or a sentence."""
    import torch
    from transformers import AutoModelForCausalLM

    from lib.attribution.kernel import load_kernel as load_attribution

    path = world.folder / "attribution.yaml"
    model = f"model: {{id: {json.dumps(str(world.folder / 'model'))}, dtype: float32}}"
    sets = "data: {general: {id: x, seeds: [0], samples: 3, tokens: 4}, prompts: {toxic: {id: y}}}"
    path.write_text(f"kind: attribution\nname: small\n{model}\n{sets}\nscore: {{batch_tokens: 64}}\nrun: {{gpus: 0}}\n")
    world.tree = Tree(world.folder)
    plain = AutoModelForCausalLM.from_pretrained(world.folder / "model", dtype=torch.float64).eval()

    def rows(rng: random.Random) -> list[list[int]]:
        found = [[rng.randrange(300) for _ in range(rng.randrange(1, 9))] for _ in range(3)]
        if rng.random() < 0.4:
            odd_row = rng.choice([[], [5] * 1025, [-1, 5], [5, 10**6], [2**31 - 1], [399, 400], [299, 300], [1] * 1024])
            found[rng.randrange(3)] = odd_row
        return found

    def case(rng: random.Random) -> None:
        given = [f"score.{part}" for part in rng.sample(SCORES, rng.choice([0, 1, 2])) for part in [part]]
        experiment = load(path, overrides_of(" ".join(given)))
        ids = rows(rng)
        rng.note = given, [row[:8] for row in ids]
        for name in ("general-0", "toxic"):
            digest = experiment.token_sets().digest(world.cache, experiment.models()[0], name)
            texts = ["x"] * 3
            made = Rows(ids, texts, texts, [False] * 3)
            save_samples(world.cache, name, digest, made, source="acme/x", commit="c" * 40, attributes={})
        cells = experiment.cells(world.cache, world.site.scratch)
        plan(experiment, cells, world.cache, "cpu")
        kernel, _ = load_attribution(Job(experiment, path, world.site, 1, "", False), experiment, cells[1])
        columns, _ = kernel.compute(kernel.prepare(0, cells[1].rows))
        every = [v for v in columns.values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
        if experiment.score.level == "neuron" and experiment.score.target == "last" and experiment.score.scores:
            assert all(np.isfinite(v).all() for v in every)
            with torch.no_grad():
                wanted = [float(plain(torch.tensor([row])).logits[0, -1].max()) for row in ids]
            assert np.allclose(columns["logit"], wanted, rtol=1e-4, atol=1e-3)

    fuzz(0.03, in_world(world, case))


# --- file systems ----------------------------------------------------------------------------------------------------


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


# --- sets of tokens --------------------------------------------------------------------------------------------------


def test_sets_of_tokens(tmp_path: Path) -> None:
    rows = Rows(
        [[1, 2, 3], [4, 5]], ["a", "b"], ["c", "d"], [False, True], {"x": np.arange(2.0), "y": ["t", "u"]}, {"n": 1}
    )
    digest = "ab" * 32
    save_samples(tmp_path, "toxic", digest, rows, source="acme/x", commit="c" * 40, attributes={"identity": {"a": 1}})
    tree = Tree(tmp_path)

    def case(rng: random.Random) -> None:
        path = rng.choice(tree.files())
        data = path.read_bytes()
        path.write_bytes(json_bytes(rng, json.loads(data)) if path.suffix == ".json" else mutated(rng, data))
        if rng.random() < 0.1:
            rng.note = misplaced(rng, path)
        try:
            found = read_samples(tmp_path, samples_input(tmp_path, "toxic", digest))
            assert len(found.every) == 2 and len(found.ids) == 1
            assert [list(row) for row in found.every] == rows.ids
        finally:
            tree.restore()

    fuzz(0.08, case)
