"""A box without Slurm: submitit's local executor, and a queue of tasks that its workers share.

A worker leases the GPUs of a task from the kernel, so that no two tasks of this box ever meet on one: whoever submits
next queues behind. Then it takes the next unclaimed task and runs the same batch script that Slurm would run, so a slow
task holds up one worker and nobody else. (submitit's own local executor would start all tasks at once on GPU 0.)"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.base.atomic import listed, own_folder, read_json, write_json
from lib.base.errors import DONE, REQUEUE, UserError, exit_with
from lib.base.process import HOST, own_name, pid_started
from lib.base.typed import Mistyped, parse
from lib.run.queue import Queue, log_of
from lib.run.site import ROOT, site
from lib.run.task import frozen

FOREVER_MIN = 60 * 24 * 365  # submitit wants a limit; a shard is committed every minute, so none is needed
BUSY_MIB = 2000  # a GPU with more than this in use belongs to somebody
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """What a queue's workers do."""

    command: list[str]  # the batch script and what it is called with
    tasks: str  # by lib.run.task.freeze
    label: str
    gpus: int  # a task
    workers: int
    after: list[str] = field(default_factory=list)  # queues whose end is waited for


@dataclass(frozen=True)
class Dispatcher:
    """Who waits for the workers of a queue."""

    pid: int
    pid_started: str
    host: str


def read_plan(queue: Path) -> Plan:
    """Of a queue that nobody else can have written."""
    try:
        return parse(Plan, read_json(own_folder(queue) / "plan.json"))
    except Mistyped as e:
        raise UserError(f"{queue / 'plan.json'} cannot be read ({e}); submit again") from None


def start(folder: Path, job: str, plan: Plan, env: dict[str, str], held: int) -> None:
    """Leave a dispatcher behind that outlives this shell, and return. It holds on to `held` until it can be seen."""
    queue = own_folder(folder / "queue" / job)  # what lies there is executed: the plan's command, submitit's pickles
    write_json(queue / "plan.json", asdict(plan))
    with (queue / "dispatcher.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "lib.cluster.local", str(queue), str(held)],
            pass_fds=(held,),
            cwd=ROOT,
            env={**env, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    for _ in range(100):  # until it has said who it is, so that the next command sees it
        if (queue / "dispatcher.json").exists():
            return
        time.sleep(0.1)
    raise UserError(f"the local workers did not start; see {queue / 'dispatcher.log'}")


def dispatch(folder: Path, held: int) -> None:
    """Start the workers of a queue, once those that it waits for have ended, and wait for them."""
    from submitit.local.local import LocalExecutor

    plan, queue = read_plan(folder), Queue(folder, "")
    write_json(folder / "dispatcher.json", asdict(Dispatcher(os.getpid(), pid_started(os.getpid()), HOST)))
    os.close(held)
    while any(map(is_alive, map(Path, plan.after))) and not queue.cancelled:
        time.sleep(LOOK_SECONDS)
    executor = LocalExecutor(folder / "submitit")
    executor.update_parameters(timeout_min=FOREVER_MIN, stderr_to_stdout=True)
    tasks = frozen(folder.parent.parent, plan.tasks).indices
    workers = range(min(len(tasks), plan.workers))
    jobs = [executor.submit(work, str(folder), f"worker-{number}") for number in workers]
    failed = sorted(index for job in jobs for index in job.result())
    print(f"all workers have ended; tasks that failed: {failed or 'none'}", flush=True)


def work(folder: str, worker: str) -> list[int]:
    """Take tasks until none is left; returns those that failed."""
    queue = Queue(Path(folder), worker)
    plan = read_plan(queue.folder)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it; a worker must be able to end
    indices, failed = frozen(queue.folder.parent.parent, plan.tasks).indices, []
    with leased(plan, queue) as (gpus, leases):
        while (index := queue.claim(indices)) is not None:
            code = REQUEUE
            while code == REQUEUE and not queue.cancelled:
                code = _run(plan, queue, index, gpus, leases)
                index = queue.now  # its process may have gone on to a later task
            queue.ended(index, code)
            if code != DONE:
                failed.append(index)
    return failed


def _run(plan: Plan, queue: Queue, index: int, gpus: str, leases: list[int]) -> int:
    log = log_of(plan.label, queue.folder.name, index, ROOT)
    env = {**os.environ, "SUITE_LOG": str(log), "SLURM_ARRAY_TASK_ID": str(index), "SLURM_SUBMIT_DIR": str(ROOT)}
    env |= {"CUDA_VISIBLE_DEVICES": gpus, "SUITE_QUEUE": str(queue.folder), "SUITE_WORKER": queue.worker}
    with log.open("ab") as out:  # what it starts holds the leases too: a killed worker's job keeps its GPU
        return subprocess.call(["bash", *plan.command], cwd=ROOT, env=env, stdout=out, stderr=out, pass_fds=leases)


@contextmanager
def leased(plan: Plan, queue: Queue) -> Iterator[tuple[str, list[int]]]:
    """CUDA_VISIBLE_DEVICES for one task, and what holds these GPUs, and as many of the site's slots; waits until there
    are so many."""
    slots, held, on = _slots(plan, queue), dict[str, socket.socket](), dict[str, socket.socket]()
    while not queue.cancelled:
        held = _take(slots, min(max(plan.gpus, 1), len(slots)))
        on = _take(_free(), plan.gpus) if held and plan.gpus else {}
        if held and len(on) == plan.gpus:
            break
        for one in held.values():
            one.close()
        held = {}
        time.sleep(LOOK_SECONDS)
    taken = [*held.values(), *on.values()]
    try:
        yield ",".join(on), [one.fileno() for one in taken]
    finally:
        for one in taken:
            one.close()


def _take(leases: dict[str, str], count: int) -> dict[str, socket.socket]:
    """So many of these names, or none."""
    found: dict[str, socket.socket] = {}
    for name, lease in leases.items():
        if len(found) < count and (held := own_name(lease)):
            found[name] = held
    if len(found) < count:
        for held in found.values():
            held.close()
        return {}
    return found


def _free() -> dict[str, str]:
    """Name -> lease of the GPUs that nobody uses."""
    return {gpu.index: f"gpu-{gpu.uuid}" for gpu in gpus() if gpu.used_mib < BUSY_MIB}


def _slots(plan: Plan, queue: Queue) -> dict[str, str]:
    """Of all queues of this scratch together: as many as may be used at once."""
    scratch = hashlib.sha256(str(queue.folder.parent.parent.parent).encode()).hexdigest()[:16]
    most = max(site().throttle, plan.workers * max(plan.gpus, 1))
    return {str(number): f"slot-{os.getuid()}-{scratch}-{number}" for number in range(most)}


@dataclass(frozen=True)
class Gpu:
    index: str
    uuid: str
    used_mib: int


def gpus() -> list[Gpu]:
    """Those of this box, or of them those in CUDA_VISIBLE_DEVICES. A UserError where nvidia-smi does not say."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        rows = [[word.strip() for word in line.split(",")] for line in out.splitlines() if line.strip()]
        found = [Gpu(index, uuid, int(used)) for index, uuid, used in rows]
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        raise UserError(
            f"nvidia-smi does not say which GPUs there are ({e}); run.gpus=0 means that none is needed"
        ) from None
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [gpu for gpu in found if not allowed or {gpu.index, gpu.uuid} & set(allowed.split(","))]


def workers_for(per_task: int, most: int) -> int:
    """How many tasks this box runs at once; a UserError where it can start none."""
    if not per_task:
        return most
    have = gpus()
    if len(have) < per_task:
        fix = "lower run.gpus, for students set run.fewest=true, or leave the size out"
        raise UserError(f"a task needs {per_task} GPUs and this box has {len(have)}; {fix}")
    if not any(gpu.used_mib < BUSY_MIB or is_leased(gpu) for gpu in have):
        used = ", ".join(f"GPU {gpu.index}: {gpu.used_mib} MiB" for gpu in have)
        raise UserError(f"all GPUs are in somebody's use ({used}); wait, or end what uses them (nvidia-smi)")
    return max(1, min(most, len(have)) // per_task)


def is_leased(gpu: Gpu) -> bool:
    """By a task of this suite, which will end: a submission queues behind it."""
    held = own_name(f"gpu-{gpu.uuid}")
    if held:
        held.close()
    return held is None


def is_alive(queue: Path) -> bool:
    with suppress(Mistyped):
        who = parse(Dispatcher, read_json(queue / "dispatcher.json"))
        return who.host == HOST and pid_started(who.pid) == who.pid_started != ""
    return False


def tasks(folder: Path) -> list[tuple[int, tuple[str, ...], str, str]]:
    """Tasks in the hands of a living dispatcher: index, cells, PENDING in its queue or RUNNING, the queue's name."""
    found = []
    for queue in listed(folder / "queue", "local-*"):
        if not is_alive(queue):
            continue
        try:
            them = frozen(folder, parse(Plan, read_json(queue / "plan.json")).tasks)
        except (Mistyped, UserError):
            continue
        for index in them.indices:
            claim, names = queue / f"task-{index}", tuple(them.cells[str(index)])
            if claim.exists() and not (claim / "exit").exists():
                found.append((index, names, "RUNNING", queue.name))
            elif not claim.exists() and not (queue / "cancelled").exists():
                found.append((index, names, "PENDING", queue.name))
    return found


def cancel(folder: Path) -> list[str]:
    """No worker takes another task. Returns the queues that were still alive."""
    names = sorted({queue for *_, queue in tasks(folder)})
    for queue in listed(folder / "queue", "local-*"):
        with suppress(OSError):
            (queue / "cancelled").touch()
    return names


if __name__ == "__main__":
    exit_with(lambda: dispatch(Path(sys.argv[1]), int(sys.argv[2])))
