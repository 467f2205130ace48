"""Fixtures for all tests: a real Slurm on this machine, with accounting and pretended GPUs."""

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TAKEN = os.environ.get("SUITE_TESTS_TAKEN")  # a folder where the processes of one run say which files they take
TMP = Path("/tmp")  # sockets live there, and their paths must be short
CI = os.environ.get("CI") == "true"
END_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
SACCT_FIELDS = ("JobID", "State", "ExitCode", "ElapsedRaw", "AllocTRES", "NodeList", "Start", "End")


# What takes longest must not come last. On Slurm: by one process, since there is one Slurm, and logs under its job ids.
ON_SLURM = "on Slurm"
LONGEST = (
    ON_SLURM,
    "test_kernels_compile",
    "test_fetch",
    "test_prepare_hub",
    "test_local",
    "test_vllm",
    "test_tiny",
    "test_fetch_trust",
    "test_advice",
    "test_front_door",
    "test_attribution_runs",
)


def pytest_configure() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What the tests' files import is there to stay: nobody looks through it again, for a tenth of the time."""
    gc.freeze()
    gc.enable()


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Of several processes that run the same tests (tests/parts.py) each takes file after file that no other has."""
    if not TAKEN or session.config.option.collectonly or session.testsfailed:
        return None
    order = {name: number for number, name in enumerate(LONGEST)}
    parts = {name: list(items) for name, items in groupby(sorted(session.items, key=_part), _part)}
    mine = (
        item for name in sorted(parts, key=lambda n: order.get(n, len(order))) if _take(name) for item in parts[name]
    )
    item = next(mine, None)
    while item:
        after = next(mine, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if stop := session.shouldfail or session.shouldstop:
            raise session.Failed(stop) if session.shouldfail else session.Interrupted(stop)
        item = after
    return True


def _part(item: pytest.Item) -> str:
    on_slurm = "slurm" in item.fixturenames or item.path.stem == "test_slurm_up"
    return ON_SLURM if on_slurm else item.path.stem


def _take(name: str) -> bool:
    try:
        Path(TAKEN, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.fixture(autouse=True)
def own_site() -> Iterator[None]:
    """What one test has set up of a site is no other's."""
    _forget_site()
    yield
    _forget_site()


def _forget_site() -> None:
    if read := sys.modules.get("lib.run.site"):  # where nobody has imported it, nobody has read one
        read.site.cache_clear()


PATIENCE = 4  # times what an idle machine needs at most: the tests may share theirs


def wait_until(
    condition: Callable[[], object], timeout: float, what: str | Callable[[], str], every: float = 0.1
) -> None:
    end = time.monotonic() + PATIENCE * timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"after {PATIENCE * timeout} s: {what if isinstance(what, str) else what()}")
        time.sleep(every)


def thaw(*pids: int, after: signal.Signals | None = None) -> None:
    """Let frozen processes go on, once a signal waits for them or Slurm has already let them go on itself."""

    def told(pid: int) -> bool:
        try:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            return True  # killed already
        return not status["State"].startswith("T") or bool(int(status["ShdPnd"], 16) >> (after - 1) & 1)

    for pid in pids:
        if after:
            wait_until(lambda pid=pid: told(pid), 60, f"{after.name} did not reach process {pid}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def freeze(experiment: Path, *cells: str) -> list[int]:
    """Stop the processes that are at work on cells, while they load: what follows depends on nobody's speed."""
    pids: dict[str, int] = {}

    def there() -> bool:
        beats = [json.loads(path.read_text()) for path in (experiment / "tasks").glob("[!.]*.json")]
        pids.update((beat["cell"], beat["pid"]) for beat in beats)
        return pids.keys() >= set(cells)

    wait_until(there, 60, lambda: f"only {sorted(pids)} of {cells} began", every=0.02)
    for cell in cells:
        os.kill(pids[cell], signal.SIGSTOP)
    return [pids[cell] for cell in cells]


@contextlib.contextmanager
def local_logs(scratch: Path) -> Iterator[None]:
    """Those that local workers write meanwhile are removed after it, and nobody else's."""
    yield
    for queue in scratch.glob("*/queue/local-*"):
        for log in (ROOT / "slurm" / "logs").glob(f"*-{queue.name}_*.out"):
            log.unlink()


def slurm_logs() -> set[Path]:
    """Not those of local workers, which other tests may have at the same time."""
    return {path for path in (ROOT / "slurm" / "logs").iterdir() if "-local-" not in path.name}


class Slurm:
    """A Slurm that env/slurm-up.sh raised in `folder`; `env` is what a shell has after sourcing its env.sh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        out = subprocess.check_output(["bash", "-c", f". {folder}/env.sh && env -0"], text=True)
        self.env = dict(item.partition("=")[::2] for item in out.split("\0") if "=" in item)

    def run(self, *command: object, cwd: Path | None = None, **env: str) -> str:
        """stdout of a command; an AssertionError with its stderr when it fails."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=cwd, env=self.env | env, text=True, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *args: object, cwd: Path | None = None, **env: str) -> str:
        """Submit; the job's id."""
        return self.run("sbatch", "--parsable", *args, cwd=cwd, **env).strip()

    def states(self, job: str) -> dict[str, str]:
        """State by id (`7`, or `7_0`, `7_1`, ...) of a job, all tasks of an array, or one task; ended ones too."""
        out = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T")
        return dict(line.split() for line in out.splitlines())

    def wait_for(self, job: str, *states: str, timeout: float = 30) -> dict[str, str]:
        """Until all tasks of `job` are in one of `states` (default: any in which a job has ended)."""
        wanted, seen = set(states or END_STATES), {}

        def there() -> bool:
            seen.update(self.states(job))
            return bool(seen) and set(seen.values()) <= wanted

        every = 0.1 if states else 0.4  # how it ended does not pass
        wait_until(there, timeout, lambda: f"job {job} is {seen}, not {sorted(wanted)}\n{self.run('squeue')}", every)
        return seen

    def sacct(self, job: str, rows: int = 1, timeout: float = 15) -> list[dict[str, str]]:
        """Every run of a job's tasks, once there are `rows` that have ended: accounting lags by some seconds."""
        found: list[dict[str, str]] = []

        def there() -> bool:
            out = self.run("sacct", "-nPX", "--duplicates", "-j", job, "-o", ",".join(SACCT_FIELDS))
            found[:] = [dict(zip(SACCT_FIELDS, line.split("|"), strict=True)) for line in out.splitlines()]
            return sum(row["End"] != "Unknown" for row in found) >= rows

        wait_until(there, timeout, lambda: f"sacct has {found}, not {rows} ended rows of job {job}", every=0.4)
        return found

    def show(self, job: str) -> dict[str, str]:
        """scontrol's fields of one job or task."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def kill_node(self, node: str) -> None:
        """kill -9 its slurmd and report the node down: its jobs are requeued while their old processes run on."""
        pid = int((self.folder / "run" / f"slurmd.{node}.pid").read_text())
        assert Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd"
        os.kill(pid, 9)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def revive_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)
        wait_until(lambda: self.node_state(node) == "idle", 30, f"{node} did not come back")

    def node_state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T").strip()

    def clear(self) -> None:
        """Cancel every job, and bring every node back."""
        self.run("scancel", "--user", str(os.getuid()))
        self.run("scancel", "--user", str(os.getuid()), "--signal=KILL", "--full")
        wait_until(lambda: not self.run("squeue", "-h"), 30, lambda: self.run("squeue"))
        for line in self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines():
            node, state = line.split()
            if state.startswith("down"):
                self.revive_node(node)


def raise_slurm(*options: object, folder: Path | None = None) -> Slurm:
    """env/slurm-up.sh in a folder that names this process, on ports that are free."""
    folder = folder or Path(tempfile.mkdtemp(prefix=f"suite-slurm-{os.getpid()}-", dir=TMP))
    said = ""
    for attempt in range(5):
        port = 20000 + (os.getpid() * 37 + attempt * 501) % 12000  # below the ports that the kernel hands out itself
        command = [ROOT / "env/slurm-up.sh", "--dir", folder, "--port", port, *options]
        done = subprocess.run([str(word) for word in command], text=True, capture_output=True, check=False)
        if done.returncode == 0:
            return Slurm(folder)
        said = done.stderr.strip()
        if done.returncode == 3 and not CI:
            pytest.skip(said.splitlines()[-1])
        if "is in use" not in said:
            break
    shutil.rmtree(folder, ignore_errors=True)
    pytest.fail(said, pytrace=False)


def lower_slurm(folder: Path) -> None:
    subprocess.run([ROOT / "env/slurm-down.sh", "--dir", folder], check=True, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Stop what a test run that was killed has left."""
    for folder in TMP.glob("suite-slurm-*"):
        if not Path("/proc", folder.name.split("-")[2]).exists():
            lower_slurm(folder)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """3 nodes x 2 pretended GPUs with accounting, shared by the whole run: use fresh_slurm unless you only look."""
    sweep()
    box = raise_slurm("--test", "--nodes", 3, "--gpus", 2, "--cpus", 4, "--memory", 4000)
    yield box
    lower_slurm(box.folder)


@pytest.fixture
def fresh_slurm(slurm: Slurm) -> Iterator[Slurm]:
    """The same with an empty queue and all its nodes, before and after."""
    slurm.clear()
    yield slurm
    slurm.clear()
