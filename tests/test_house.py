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


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms(pattern: str) -> list[Path]:
    return [p for p in SOURCES if re.match(pattern, str(p.relative_to(ROOT)))]


def forbid(files: list[Path], *prefixes: str) -> None:
    assert files
    for path in files:
        for name in imports(path):
            for prefix in prefixes:
                assert name != prefix and not name.startswith(f"{prefix}."), f"{path.relative_to(ROOT)} imports {name}"


def test_lib_never_imports_jobs():
    forbid(rooms("lib/"), "jobs", "tests")


def test_jobs_do_not_import_each_other():
    forbid(rooms("jobs/"), "jobs")


def test_store_and_cluster_know_no_model():
    heavy = ("torch", "transformers", "peft", "vllm", "lib.models", "lib.lls", "lib.attribution", "lib.inputs")
    forbid(rooms("lib/(store|cluster|experiments)/"), *heavy)


def test_store_knows_nothing_above_it():
    forbid(rooms("lib/store/"), "jobs.cluster", "lib.families", "lib.run.rows", "lib.run.command")


def test_kernels_know_no_files_no_slurm_no_configs():
    kernels = [
        p
        for p in rooms("lib/(scoring|models|attribution|evaluation)/")
        if p.name not in ("tiny.py", "load.py", "lls_plots.py")
    ]
    forbid(
        [p for p in kernels if "plot" not in p.name and "report" not in p.name],
        "lib.cluster",
        "lib.families",
        "h5py",
        "yaml",
    )


def test_the_loop_knows_no_experiment():
    forbid([ROOT / "lib" / "run.py"], "lib.families", "lib.lls", "lib.attribution", "lib.models", "torch")


def test_importing_the_command_line_takes_no_torch():
    heavy = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    code = f"import sys, lib.cluster.command, lib.cluster.doctor, lib.run.command; print({heavy})"
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
        "time": "0-04:00",
    },
    "compute_attributions": {
        "array": "0-3",
        "partition": "gpu_requeue",
        "gpus-per-node": "1",
        "cpus-per-gpu": "8",
        "mem-per-gpu": "100G",
        "time": "0-02:00",
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
