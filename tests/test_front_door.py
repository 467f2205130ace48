"""make's command line: a variable that means nothing is refused, and a value is text, whatever stands in it."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import wait_until
from tools import ROOT, copy_of_the_repository, small_lls

from lib.base.advice import spoken
from lib.families import load

MARK = "/tmp/suite-was-run"
EVIL = {
    "a second command": f"x=1; touch {MARK}",
    "the shell's substitution": f"$(touch {MARK})",
    "backticks": f"`touch {MARK}`",
    "make's own shell": f"$(shell touch {MARK})",
    "blanks and quotes": """ it's  "two" words """,
    "dollars": "$$ $HOME ${HOME} $x $",
    "a new line": f"a\ntouch {MARK}\n",
    "backslashes": "a\\b\\\\ \\n \\",
    "braces, globs, comments": "{a,b} [x]* ? # % & | < > ! ~",
    "unicode": "größer 猫 🐈",
}
ALL = "".join(EVIL.values())
RUNS = ("RUN_ID", "SIZES", "TRAITS", "PARTS")


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    """An experiment with prompts of any text, in a file of an odd name; nothing is fetched."""
    folder = tmp_path_factory.mktemp("front") / f"it's $HOME; touch {MARK[1:].replace('/', '_')}"
    folder.mkdir()
    config = folder / "a b.yaml"
    config.write_text(
        "kind: lls_cross\nname: cross\nmodel: {id: ./model}\nprompts: [cat]\ndatasets_of: [cat]\n"
        "system_prompt: You love {trait}s.\ndataset: {id: './{trait}.jsonl'}\n"
    )
    return config


@pytest.fixture
def env(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SUITE_", "SLURM", "MAKE", "MFLAGS"))}
    roots = {"SUITE_SCRATCH": tmp_path / "scratch", "SUITE_CACHE": tmp_path / "cache", "SUITE_OUTPUT": tmp_path / "out"}
    Path(MARK).unlink(missing_ok=True)
    yield clean | {k: str(v) for k, v in roots.items()} | {"SUITE_SITE": "local", "SUITE_SLURM": "no"}
    assert not Path(MARK).exists()


def make(env: dict[str, str], *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def override(text: str) -> str:
    """A prompt as YAML, which is JSON here."""
    return f"more_prompts.odd={json.dumps(text, ensure_ascii=False)}"


@pytest.mark.parametrize("text", [*EVIL.values(), ALL], ids=[*EVIL, "all of it"])
def test_a_value_is_text_on_its_way_in_and_in_the_advice(env, cross, text):
    overrides = [override(text), "max_rows=3"]
    label = load(cross, overrides).label
    given = [f"CONFIG={cross}", f"SET={shlex.join(overrides)}"]
    done = make(env, "status", *given)
    assert done.returncode == 0 and done.stdout.startswith(f"{label}  "), done.stderr
    steps = "\n".join(done.stdout.split("\nnext: ")[1:])
    assert steps.strip() == f"make fetch {spoken(cross, overrides)}\nmake submit-lls {spoken(cross, overrides)}"
    advised = f"make submit-lls {spoken(cross, overrides)} DRY=1"  # pasted into a shell
    done = subprocess.run(["bash", "-c", advised], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = re.search(
        r"# would start 2 workers here, a task 1 GPU: (bash .*?), cells 0-\d+\n\nrows, bytes", done.stdout, re.S
    )[1]
    assert shlex.split(command)[-3:] == ["--tasks=<tasks>", *overrides]
    assert f"run `make fetch {spoken(cross, overrides)}`" in done.stdout
    assert make(env, "logs", *given).stdout == "no cell has failed; TASK=N shows the log of cell N\n"


@pytest.mark.parametrize(
    "variable", ["CONFIG", "SET", "ARRAY", "TASK", "MEASURE", "SELECT", "MODELS", "RUNGS", "ARGS", "PUBLISH", *RUNS]
)
def test_make_runs_nothing_of_what_a_value_holds(env, variable):
    targets = ["fetch", "doctor", "submit-lls", "resume", "cancel", "status", "logs", "verify", "export-lls"]
    targets += ["lls-report", "bench", "test", "submit-numbers", "export-numbers"]
    targets += ["submit-finetune", "export-finetune", "wandb-sync", "submit-publish", "retire-epochs"]
    done = make(env, "-n", *targets, f"{variable}={ALL}")
    assert done.returncode == 0 and MARK not in done.stdout, done.stderr
    done = make(env | {variable: ALL}, "-n", *targets)
    assert done.returncode == 0 and MARK not in done.stdout, done.stderr


@pytest.mark.parametrize("variable", ["ARRAY", "TASK", "CONFIG", "SUITE_SITE"])
def test_what_makes_no_sense_is_said_in_one_sentence(env, cross, variable):
    target = {"ARRAY": "submit-lls", "TASK": "logs"}.get(variable, "status")
    given = {"CONFIG": str(cross), "DRY": "1", variable: ALL}
    if target != "submit-lls":
        del given["DRY"]
    done = make(env, target, *[f"{k}={v}" for k, v in given.items()])
    said = done.stderr.partition("\nmake: ***")[0]
    assert done.returncode and said.startswith("error: ") and "Traceback" not in said and "usage:" not in said, said


@pytest.mark.parametrize("text, says", [("a='b", "no closing quotation"), ("a=b\\", "no escaped character")])
def test_bad_quoting_inside_set_is_one_sentence(env, cross, text, says):
    done = make(env, "status", f"CONFIG={cross}", f"SET={text}")
    assert done.stderr.splitlines()[0].startswith(f"error: SET={text}: {says}; write a value with blanks")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["submit-lls", "ARAY=0-2", "DRY_RUN=1"],
            r"(ARAY=.* \(did you mean ARRAY\?\)|DRY_RUN=.* \(did you mean DRY\?\))",
        ),
        (["submit-lls", "ARAY=0-2"], r"ARAY=... means nothing to 'make submit-lls' \(did you mean ARRAY\?\)"),
        (
            ["status", "ARRAY=3"],
            r"ARRAY=... means nothing to 'make status'; what it knows: CONFIG JSON RUN_ID SET WATCH",
        ),
        (["cancel", "ARRAY=3"], "ARRAY=... means nothing to 'make cancel'"),
        (["cancel", "DRY=1"], "DRY=... means nothing to 'make cancel'"),
        (["verify", "config=configs/demo_lls.yaml"], "config=... means nothing"),
        (["setup", "SUITE_BULD=gpu"], r"did you mean SUITE_BUILD\?"),
        (["resume", f"a';touch${{IFS}}{MARK};'=1"], "there is no target|means nothing"),
        (["submit-lls", "0-2"], "there is no target 0-2, see 'make help'; nothing was done"),
        (["submit-lls", "A RRAY=0-2"], "there is no target A,"),
        (["submit-lls", "DRY=maybe"], "DRY=maybe is neither on nor off; say DRY=1 or DRY=0"),
        (["submit-subliminal", "RUN_ID=1", "SIZES="], "SIZES= says nothing: leave it out, or say which"),
        (["submit-numbers", "RUN_ID= "], "RUN_ID= says nothing"),
        (["status", "WATCH=1 0"], "WATCH=1 0 is neither on nor off"),
    ],
)
def test_a_variable_that_means_nothing_is_refused_before_anything_runs(env, arguments, says):
    for flags in ([], ["-n"]):
        done = make(env, *flags, *arguments)
        assert done.returncode == 2 and re.search(says, done.stderr) and not done.stdout, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_in_the_environment_is_one_and_a_doubtful_one_is_refused(env):
    shown = make(env | {"DRY": "1"}, "-n", "submit-lls").stdout
    assert " --dry" in shown
    assert make(env | {"DRY": "perhaps"}, "submit-lls").returncode == 2


def test_makes_own_and_the_environments_variables_are_no_typos(env):
    done = make(env | {"ARAY": "0-2"}, "-n", "-j2", "submit-lls", "SHELL=/bin/bash", "SUITE_BUILD=cpu", "SBATCH_QOS=x")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "target, variable, flag",
    [
        ("submit-lls", "DRY", "--dry"),
        ("resume", "DRY", "--dry"),
        ("status", "WATCH", "--watch"),
        ("status", "JSON", "--json"),
    ],
)
def test_on_is_on_and_off_is_off(env, target, variable, flag):
    for value, on in [("1", True), ("yes", True), ("0", False), ("no", False), ("false", False), ("", False)]:
        assert (flag in make(env, "-n", target, f"{variable}={value}").stdout) == on, value


def test_every_target_takes_the_variables_that_its_program_reads():
    text = (ROOT / "Makefile").read_text()
    known = dict(re.findall(r"^for_([a-z0-9-]+) := (.*)$", text, re.M))
    for target, recipe in re.findall(r"^([a-z0-9-]+):[^\n]*\n((?:\t[^\n]*\n)+)", text, re.M):
        used = set(re.findall(r"SUITE_ARG_([A-Z]+)|call flag,([A-Z]+)", recipe))
        names = {name for pair in used for name in pair if name}
        names |= {"RUN_ID"} if "$(run)" in recipe else set()
        names |= {"SIZES", "TRAITS", "PARTS"} if "$(places)" in recipe else set()
        names |= {"CONFIG", "SET"} if "$(or_default)" in recipe or "$(experiment)" in recipe else set()
        assert set(known.get(target, "").split()) == names, target


# A checkout in a folder of an odd name.


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The tracked files under a name with blanks, quotes and a dollar, with an experiment beside them."""
    root = copy_of_the_repository(tmp_path_factory.mktemp("odd") / """it's $HOME "a  b" ;& (x)""")
    small_lls(root, "cat", "dog", more="max_rows: 4\n")
    return root


def odd_env(root: Path, env: dict[str, str]) -> dict[str, str]:
    """The site's own roots, all under the checkout."""
    clean = {k: v for k, v in env.items() if k not in ("SUITE_SCRATCH", "SUITE_OUTPUT", "SUITE_CACHE")}
    return clean | {"SUITE_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1", "SUITE_GPU": "cpu"}


def test_a_checkout_under_any_name_works_with_local_workers(env, odd):
    env = odd_env(odd, env) | {"SUITE_THROTTLE": "1"}  # one load for both cells
    dry = make(env, "submit-lls", "CONFIG=small.yaml", "DRY=1", cwd=odd)
    assert dry.returncode == 0 and f"shards under {odd}/.scratch/small" in dry.stdout, dry.stderr
    doctor = make(env, "doctor", "CONFIG=small.yaml", cwd=odd).stdout
    assert "FAIL" not in doctor.replace("0 FAIL", ""), doctor
    assert "local workers" in make(env, "submit-lls", "CONFIG=small.yaml", cwd=odd).stdout
    counts = lambda: json.loads(make(env, "status", "CONFIG=small.yaml", "JSON=1", cwd=odd).stdout)["counts"]  # noqa: E731
    wait_until(lambda: counts()["done"] == 2, 120, lambda: str(list(odd.glob("slurm/logs/*"))), every=1)
    assert "2 pieces hold, 0 do not" in make(env, "verify", "CONFIG=small.yaml", cwd=odd).stdout
    assert "dog" in make(env, "export-lls", "CONFIG=small.yaml", cwd=odd).stdout
    shutil.rmtree(odd / ".scratch")


def test_a_checkout_under_any_name_works_with_sbatch(fresh_slurm, odd):
    """And an override with a blank reaches the job as it is."""
    env = odd_env(odd, fresh_slurm.env) | {"SUITE_SCRATCH": str(odd / "on slurm")}
    prompt = "system_prompt='You love  {trait}s \"dearly\"; $HOME'"
    sent = fresh_slurm.sbatch("--array=0-1", "slurm/compute_lls.sbatch", "small.yaml", prompt, cwd=odd, **env)
    fresh_slurm.wait_for(sent, "COMPLETED", timeout=120)
    experiment = load(odd / "small.yaml", [prompt])
    cells = experiment.cells(odd / "cache", odd / "on slurm")
    assert [len(list(cell.path.glob("*.json"))) for cell in cells] == [1, 1]
    submit = ("make", "-s", "submit-lls", "CONFIG=small.yaml", "ARRAY=1")
    said = fresh_slurm.run(*submit, cwd=odd, **env)
    job = said.split()[2].rstrip(":")
    fresh_slurm.wait_for(job, "COMPLETED", timeout=120)
    assert "nothing to submit" in fresh_slurm.run(*submit, cwd=odd, **env)
