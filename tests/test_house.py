"""The house's rules: who may import whom, what the front door says, what the batch files hold, what is never done."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools import ROOT

from lib.cluster.slurm import parse_array

SOURCES = sorted([*ROOT.glob("lib/**/*.py"), *ROOT.glob("jobs/*.py")])
BATCH = sorted(ROOT.glob("slurm/*.sbatch"))

# Each room knows its own insides and the rooms before it, nothing else. Families do not know each other.
FAMILIES = ("attribution", "numbers")
ROOMS = [
    *("base", "config", "checkpoint", "store", "inputs", "run", "cluster", "models", "report", "evaluation"),
    FAMILIES,
    ("pruning", "lls"),
    "lora",
    "preferences",
    "publish",
    *("subliminal", "families", "demo", "bench"),
]
LEVEL = {name: i for i, level in enumerate(ROOMS) for name in ([level] if isinstance(level, str) else level)}
LIGHT = ("base", "config", "checkpoint", "store", "run", "cluster", "families")  # status answers in a moment
HEAVY = {"torch", "transformers", "peft", "vllm", "triton", "accelerate", "lxt"}
# What kernels are made of: tensors and arrays in and out, no files of results, no Slurm, no configurations.
KERNELS = ("models", "evaluation")
OUTSIDE_KERNELS = ("lib.store", "lib.run", "lib.cluster", "lib.config", "h5py", "yaml")


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions, and what the list of experiments names for later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(":") == 1:
            found |= {node.value.partition(":")[0]} & set(MODULES)
    return found


def known(path: Path) -> set[str]:
    """Modules of ours that a file imports; a package stands for its own file."""
    return {name for name in imports(path) if name in MODULES and MODULES[name] != path}


def room(name: str) -> str:
    return name.split(".")[1]


def reach(start: set[str]) -> dict[str, str]:
    """All that can be reached by imports, and from where."""
    found = dict.fromkeys(start, "")
    waiting = list(start)
    while waiting:
        here = waiting.pop()
        for name in known(MODULES[here]):
            parents = {name.rsplit(".", i)[0] for i in range(name.count("."))}
            for one in parents & set(MODULES) - set(found):
                found[one] = here
                waiting.append(one)
    return found


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES if name.startswith("lib.")} == set(LEVEL)


def test_no_import_goes_upward():
    for name in [name for name in MODULES if name.startswith("lib.")]:
        for other in known(MODULES[name]):
            assert other.split(".")[0] == "lib", f"{name} imports {other}"
            if other != "lib" and room(other) != room(name):
                assert LEVEL[room(other)] < LEVEL[room(name)], f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    state: dict[str, bool] = {}  # False: being looked at

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) is not False, " -> ".join([*path[path.index(name) :], name])
        if name not in state:
            state[name] = False
            for other in sorted(known(MODULES[name])):
                visit(other, (*path, name))
            state[name] = True

    for name in MODULES:
        visit(name, ())


def test_jobs_do_not_import_each_other_and_are_short():
    for path in ROOT.glob("jobs/*.py"):
        assert not [name for name in imports(path) if name.startswith("jobs")], path
        assert len(path.read_text().splitlines()) <= 60, path


def test_torch_is_out_of_reach_of_all_that_must_answer_in_a_moment():
    found = reach({name for name in MODULES if name.startswith("lib.") and room(name) in LIGHT} | {"jobs.cluster"})
    for name, through in found.items():
        heavy = {outside.split(".")[0] for outside in imports(MODULES[name])} & HEAVY
        assert not heavy, f"{name} imports {heavy} and is imported by {through}"


def test_kernels_know_no_files_no_slurm_no_configs():
    for name in [name for name in MODULES if name.startswith("lib.") and room(name) in KERNELS]:
        for outside in imports(MODULES[name]):
            assert not outside.startswith(OUTSIDE_KERNELS), f"{name} imports {outside}"


def test_the_command_line_is_there_in_a_moment():
    """No torch, no arrays before they are asked for, no family but those that are read."""
    heavy = "[m for m in ('torch', 'transformers', 'numpy._core', 'h5py._hl') if m in sys.modules]"
    code = (
        "import sys, jobs.cluster; assert not [m for m in sys.modules if m.startswith(('lib.lora', 'lib.pruning'))];"
        "from lib.families import Kinds; assert all(issubclass(kind, object) for kind in Kinds().values());"
        f"import lib.cluster.doctor, lib.run.command; print({heavy})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_unpickled_and_nothing_goes_through_a_shell():
    for path in SOURCES:
        text = path.read_text()
        assert not imports(path) & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
        assert "torch.load(" not in text or "weights_only=True" in text, path
        assert "shell=True" not in text and "os.system" not in text and "eval(" not in text.replace(".eval(", ""), path


def test_make_help_lists_every_target_once_in_a_line():
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in set(targets) - {"shellcheck"}:
        lines = [line for line in shown.splitlines() if line.split()[:1] == [target]]
        assert len(lines) == 1 and len(lines[0]) <= 130, target
    assert subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout == shown


@pytest.mark.parametrize("path", BATCH, ids=lambda p: p.name)
def test_batch_files_are_thin_and_hold_what_survival_takes(path):
    text = path.read_text()
    lines = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.M))
    assert {"requeue", "open-mode", "signal", "output", "time", "partition", "array"} <= set(lines)
    assert lines["open-mode"] == "append" and re.fullmatch(r"B:USR1@\d+", lines["signal"])
    assert lines["output"].startswith("slurm/logs/") and (ROOT / "slurm/logs/.gitignore").exists()
    assert "$" not in "".join(v or "" for v in lines.values())  # Slurm expands no variable there
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 5
    assert parse_array(lines["array"], 100)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_shell_scripts_pass_shellcheck():
    scripts = [
        str(p) for pattern in ("env/*.sh", "slurm/*.sh", "slurm/*.sbatch", ".ci/run") for p in ROOT.glob(pattern)
    ]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_sources_are_formatted_and_lint_clean():
    for command in (["format", "--check", "."], ["check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


def test_types_hold():
    command = [sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_stay_short_enough_to_be_seen_whole():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350}
    assert not long


SURVIVAL = {"requeue": "", "open-mode": "append", "signal": "B:USR1@180", "output": "slurm/logs/%x-%A_%a.out"}
GOLDEN = {
    "compute_lls": {
        "array": "0-14%16",
        "partition": "gpu_requeue",
        "constraint": "h200",
        "gpus-per-node": "1",
        "cpus-per-gpu": "8",
        "mem-per-gpu": "180G",
        "time": "0-01:00",
    },
    "compute_attributions": {
        "array": "0-3",
        "partition": "gpu_requeue",
        "constraint": "h200",
        "gpus-per-node": "1",
        "cpus-per-gpu": "8",
        "mem-per-gpu": "100G",
        "time": "0-00:20",
    },
}


@pytest.mark.parametrize("job", GOLDEN)
def test_the_batch_file_asks_fasrc_for_exactly_this(job):
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (ROOT / f"slurm/{job}.sbatch").read_text(), re.M)
    assert dict(found) == {"job-name": job} | GOLDEN[job] | SURVIVAL


def test_the_site_is_chosen_in_the_order_that_is_written(tmp_path):
    def site(**env: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SUITE_", "SLURM"))}
        command = ["bash", "-c", ". env/site.sh && echo $SUITE_SITE $SUITE_SCRATCH"]
        done = subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True, check=False)
        return done.stdout.strip() or done.stderr.strip()

    assert site(SUITE_SITE="b200").startswith("b200 ")
    assert site(SUITE_SITE="fasrc", FASRC_LAB="my_lab", USER="me") == "fasrc /n/netscratch/my_lab/Lab/me/hpc-job-suite"
    assert site(SUITE_SITE="local", SUITE_SCRATCH="/x") == "local /x"
    assert "there is no env/nowhere.sh" in site(SUITE_SITE="nowhere")
