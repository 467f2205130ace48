"""Every kind of input, changed at random, through the code that a command runs: right numbers, or one sentence. Here
what is typed and what Slurm says; test_fuzz_places.py and test_fuzz_inputs.py have the rest.

The same cases for a seed. `SUITE_FUZZ_CASES=5000 SUITE_FUZZ_SEED=77` runs others, and more of them; what offends is
named with the seed that runs it alone (`-k KIND`)."""

import json
import math
import random
import string
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzz_world import Tree
from fuzzing import changed, fuzz, json_bytes, misplaced, mutated, odd, word
from tools import ROOT

from lib.base.atomic import remove
from lib.base.errors import UserError
from lib.cluster import slurm
from lib.cluster.request import gpus_of, has_features, minutes, requested
from lib.config.loading import overrides_of
from lib.families import load
from lib.inputs.samples import Rows, read_samples, samples_input, save_samples

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


# --- what is typed ---------------------------------------------------------------------------------------------------

KEYS = [
    "name", "kind", "model", "model.id", "model.revision", "model.dtype", "traits", "system_prompt", "dataset.id",
    "dataset.split", "dataset", "base", "date", "max_rows", "score", "score.batch_tokens", "score.max_tokens",
    "score.check_every", "run", "run.shard_rows", "run.log_seconds", "run.gpus", "data", "data.general.seeds",
    "data.general.tokens", "data.prompts", "data.prompts.toxic.threshold", "data.text", "score.layers",
    "score.tokens", "data.general.id", "data.prompts.toxic.id", "data.general.config", "data.text.split",
    "score.block", "max_samples", "prompts", "more_prompts", "datasets_of", "score.rule", "score.nonfinite", "", ".",
    "..", "a.b.c.d", "__class__",
]  # fmt: skip
YAML_BITS = [
    "2026-13-01", "!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!python/name:os.system", "!x y", "9" * 5000,
    "[" * 3000, "{a: " * 3000, "&a [*a]", "*a", "<<: 1", "? [a]\n: b", "- a\n- b", "0o9", "0b", "0x", "1:99:99:99",
    "1e5", "2026-01-01T99:99:99Z", "0001-01-01 00:00:00 -23:59", ".inf", ".nan", "-.inf", "~", "''", "|", ">", "%",
    "@", "`", "\t", "!!binary ////x", "!!set {a}", "!!omap [a: b]", "!!pairs x", "1" + "_" * 3000,
    "[" + "a, " * 3000 + "]", "{1: 2}", "a: b: c", "--- a\n--- b", "# x", "'", '"', '"\\ud800"', '"\\x00"',
    '"\\U0001F600"', "- " * 800, "? " * 800, "0" * 70_000 + "1", "1e" + "9" * 400, "-" + "9" * 4000,
    "0." + "9" * 5000, "[[[[1]]]]", "12345678901234567890123",
]  # fmt: skip


def typed(rng: random.Random) -> str:
    how = rng.randrange(8)
    if how < 2:
        return rng.choice(YAML_BITS)
    if how > 5:
        return rng.choice(
            ["8", "4096", "1", "true", "float32", "[cat]", "cat", "1.5", "2025-02-03", "[0, 7]", "null", "all"]
        )
    if how < 4:
        return json.dumps(odd(rng))
    return word(rng)


def nearly(rng: random.Random, config: dict[str, Any]) -> str:
    """One of its own values, or a number beside it, under its key."""
    key, value = rng.choice(list(config.items()))
    while isinstance(value, dict) and value:
        name, value = rng.choice(list(value.items()))
        key = f"{key}.{name}"
    if isinstance(value, int) and not isinstance(value, bool):
        value = max(1, value + rng.choice([-1, 0, 1]))
    return f"{key}={json.dumps(value, default=str)}"


def safe(experiment: Any) -> None:
    """What was loaded names folders below its roots, and can be digested and written."""
    assert "/" not in experiment.label and experiment.label not in (".", "..")
    json.loads(experiment.science_json())
    for name in experiment.names():
        assert name and "/" not in name and name.isprintable()
    with suppress(UserError):  # nothing is fetched there
        experiment.cells(Path("/nowhere/cache"), Path("/nowhere/scratch"))


def test_overrides() -> None:
    def case(rng: random.Random) -> None:
        path = rng.choice(CONFIGS)
        if likely := rng.random() < 0.3:
            given = [nearly(rng, yaml.safe_load(path.read_bytes())), "run_id=3"][: rng.choice([1, 2])]
        else:
            given = [f"{rng.choice(KEYS)}={typed(rng)}" for _ in range(rng.choice([1, 1, 2, 3]))]
        if not likely and rng.random() < 0.2:
            given[0] = word(rng)
        rng.note = (path.name, [g[:80] for g in given])
        given = overrides_of(" ".join(given)) if rng.random() < 0.2 else given
        found = load(path, given)
        safe(found)
        key, _, said = given[0].partition("=") if given else ("", "", "")
        try:
            plain = yaml.safe_load(said)
        except ValueError:  # of a day that is none, which is text
            plain = said
        if (
            key
            and (len(given) == 1 or (likely and key != "run_id"))
            and key.count(".") < 2
            and "{" not in said  # what becomes a part of the configuration
            and not isinstance(plain, date)
        ):
            value = found
            for part in key.split("."):
                value = value[part] if isinstance(value, dict) else getattr(value, part)
            assert value == plain or key == "traits"  # each of which becomes a whole one

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
            lambda: yaml.safe_dump(plain).encode(),
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
            remove(path)

    fuzz(0.1, case)


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
        if rng.random() < 0.8:
            path.write_bytes(json_bytes(rng, json.loads(data)) if path.suffix == ".json" else mutated(rng, data))
        if rng.random() < 0.1:
            rng.note = misplaced(rng, path)
        try:
            found = read_samples(tmp_path, samples_input(tmp_path, "toxic", digest, "acme/x"))
            assert len(found.every) == 2 and len(found.ids) == 1
            assert [list(row) for row in found.every] == rows.ids
        finally:
            tree.restore()

    fuzz(0.08, case)
