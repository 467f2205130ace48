"""Whether torch's build, the GPUs and their driver go together; nothing here imports torch."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lib.base.errors import UserError
from lib.cluster.request import Env, Line, ask
from lib.run.site import ROOT

# The oldest Linux driver that runs a CUDA of this major version, and Blackwell's own oldest
DRIVERS = {13: 580, 12: 525}
BLACKWELL, BLACKWELL_DRIVER = 10.0, 570
SEEN = ROOT / ".driver"
CAPABILITY = {"a100": 8.0, "h100": 9.0, "h200": 9.0, "b200": 10.0}


def torch_cuda() -> str | None:
    """The CUDA version torch was built for, '' for a CPU build, None without torch; read, not imported."""
    spec = find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else None
    found = re.search(r"^cuda\b.*?=\s*(?:'([\d.]+)'|None)", text or "", re.M)
    return (found[1] or "") if found else None


def seen_driver(env: Env) -> str:
    """The driver that the nodes have: SUITE_DRIVER, else what `make doctor GPU=1` saw there."""
    driver = env.get("SUITE_DRIVER", "") or (SEEN.read_text().strip() if SEEN.exists() else "")
    if driver and not re.match(r"\d{3}(\.|$)", driver):
        raise UserError(f"driver {driver[:40]} is no driver's version, such as 570; unset SUITE_DRIVER, rm -f .driver")
    return driver


def gpu_lines(env: Env, cuda: str | None, wanted: str, slurm: bool, seen: str = "") -> Iterator[Line]:
    """torch's build against the GPUs of the site and of this node, and the driver, here or `seen`, against torch."""
    if cuda is None:
        yield Line("FAIL", "torch", "is not in .venv", "make setup")
        return
    gpus = gpus_here(env)
    has = {f"{name} (sm_{cap.replace('.', '')})": float(cap) for _, cap, name in gpus}
    has = has or ({wanted: CAPABILITY[wanted]} if wanted in CAPABILITY else {})
    newest = max(has.values(), default=0.0)
    yield build_line(cuda, has if gpus or wanted != "cpu" else {}, wanted)
    driver = gpus[0][0] if gpus else seen
    if cuda and driver and (gpus or wanted != "cpu"):
        yield driver_line(cuda, driver, newest)
    elif wanted != "cpu" and not gpus and not slurm:
        yield Line("warn", "driver", f"no GPU here, no Slurm, and the site says {wanted}", "export SUITE_GPU=cpu")
    elif cuda and wanted != "cpu":
        needs = f"not known here; torch's CUDA {cuda} needs {oldest_driver(cuda, newest)} or newer on the nodes"
        yield Line("warn", "driver", needs, "`make doctor GPU=1`, or srun --gpus=1 nvidia-smi")


def gpus_here(env: Env) -> list[list[str]]:
    """Driver, compute capability and name of each GPU of this node."""
    good, out = ask(env, "nvidia-smi", "--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader")
    return [[word.strip() for word in line.split(",", 2)] for line in out.splitlines() if good and line.count(",") > 1]


def build_line(cuda: str, gpus: dict[str, float], wanted: str) -> Line:
    name = f"CUDA {cuda}" if cuda else "the CPU build"
    if not cuda and wanted != "cpu":
        return Line("FAIL", "torch", f"the CPU build, and tasks run on {wanted}", "SUITE_BUILD=gpu make setup")
    version = _version(cuda)
    for gpu, capability in gpus.items() if cuda else ():
        if capability >= 10 and version < (12, 8):
            return Line("FAIL", "torch", f"CUDA {cuda} has no code for {gpu}", "install a torch of CUDA 12.8 or newer")
        if capability < 7 or (capability < 7.5 and version >= (13, 0)):
            return Line(
                "FAIL", "torch", f"CUDA {cuda} no longer serves {gpu}", "export SBATCH_CONSTRAINT=<a newer GPU>"
            )
    return Line("ok", "torch", name + (f", serves {', '.join(gpus)}" if cuda and gpus else ""))


def oldest_driver(cuda: str, capability: float) -> int:
    need = DRIVERS.get(_version(cuda)[0], 450)
    return max(need, BLACKWELL_DRIVER) if capability >= BLACKWELL else need


def driver_line(cuda: str, driver: str, capability: float) -> Line:
    need, have = oldest_driver(cuda, capability), int(driver.partition(".")[0])
    if have >= need:
        return Line("ok", "driver", f"{driver}, torch's CUDA {cuda} needs {need}")
    older = have >= oldest_driver("12.8", capability) and _version(cuda)[0] > 12
    fix = "make setup SUITE_BUILD=gpu takes the builds for CUDA 12.8" if older else "nodes with a newer driver"
    return Line("FAIL", "driver", f"{driver}, and torch's CUDA {cuda} needs {need} or newer", fix)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2]) if text else (0, 0)
