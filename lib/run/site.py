"""The site's settings, from env/<site>.sh: the same file that the batch scripts source."""

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib.base.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Site:
    name: str
    scratch: Path
    cache: Path
    output: Path
    throttle: int
    gpu: str  # h200, b200, a100, cpu: for estimates
    env: dict[str, str]  # the whole environment that jobs and sbatch get


@cache
def site() -> Site:
    """Source env/site.sh in bash and read what it exports; the user's own environment wins inside it."""
    done = subprocess.run(["bash", "-c", ". env/site.sh && env -0"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["env/site.sh failed"]
        raise UserError(said[-1].removeprefix("error: "))
    items = [item.partition("=") for item in os.fsdecode(done.stdout).split("\0")]
    env = {key: value for key, sign, value in items if sign}
    missing = [k for k in ("SUITE_SCRATCH", "SUITE_CACHE", "SUITE_OUTPUT") if not env.get(k)]
    if missing:
        raise UserError(f"env/{env['SUITE_SITE']}.sh does not set {', '.join(missing)}; see env/local.sh for the shape")
    throttle = env.get("SUITE_THROTTLE", "16")
    if not throttle.isdigit() or int(throttle) < 1:
        raise UserError(f"SUITE_THROTTLE must be a number from 1 up; got {throttle!r}")
    scratch, cache, output = (Path(env[k]).absolute() for k in ("SUITE_SCRATCH", "SUITE_CACHE", "SUITE_OUTPUT"))
    return Site(env["SUITE_SITE"], scratch, cache, output, int(throttle), env.get("SUITE_GPU", "cpu"), env)


def apply(here: Site) -> None:
    """Make this process see what the site sets, before any library reads it; jobs never look at a network."""
    os.environ.update({k: v for k, v in here.env.items() if k.startswith(("SUITE_", "HF_"))})
