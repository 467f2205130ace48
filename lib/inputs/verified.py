"""Whether a model's files hold the bytes that were fetched. Sizes and headers do not tell: disks and network file
systems lose bits in silence.

`make fetch` records each file's sha256. A node reads them all before it loads a model, once a day: a stamp on its own
disk says when. What was read stays in its memory as far as there is room, so loading pays for most of it once."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path

from lib.base.atomic import own_folder, sha256_file
from lib.base.errors import UserError
from lib.inputs.records import ModelInput, check_model, model_files, model_input

THREADS = 8  # one does 1 to 2 GB/s
SECONDS = 24 * 3600  # that a stamp is good for
GIB = 2**30


def checked_model(cache: Path, id: str, revision: str) -> ModelInput:
    """A fetched model whose bytes are right, as far as this node has seen today."""
    found = model_input(cache, id, revision)
    check_here(found)
    return found


def hashes(files: Iterable[Path]) -> list[str]:
    """The sha256 of each."""
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(_sha256, files))
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read ({e.strerror}); put a whole file there, or none") from None


def hashes_by_name(folder: Path) -> dict[str, str]:
    """Of a model's files."""
    files = [path for path in model_files(folder) if path.is_file()]
    return dict(zip((path.name for path in files), hashes(files), strict=True))


def altered(spec: ModelInput) -> list[Path]:
    """Files of a model, whole by their size, that are not those that were fetched."""
    found = hashes_by_name(Path(spec.path))
    return [
        Path(spec.path, name) for name in sorted(found.keys() | spec.files) if found.get(name) != spec.files.get(name)
    ]


def check_bytes(spec: ModelInput) -> str:
    """Read every byte; says what that took. A UserError names a file that is not the one that was fetched."""
    began = time.monotonic()
    if bad := altered(spec):
        raise UserError(
            f"{bad[0]} is not the file that was fetched (its sha256 differs, its size does not); "
            "run `make fetch` again with this CONFIG"
        )
    seconds = max(time.monotonic() - began, 1e-9)
    return f"sha256 of {spec.bytes / GIB:.3g} GiB right, {seconds:.1f} s, {spec.bytes / 1e9 / seconds:.2f} GB/s"


def check_here(spec: ModelInput) -> None:
    """Sizes and headers always, every byte once a day and node; says which."""
    check_model(spec)
    place = Path(os.environ.get("SLURM_TMPDIR") or "/tmp", f"hpc-job-suite-{os.geteuid()}")
    with ExitStack() as open_files:
        try:
            stamp = open_files.enter_context((own_folder(place) / _identity(spec)).open("a+"))
        except (OSError, UserError):  # no such disk, a full one, or somebody else's folder
            print(f"model files: {check_bytes(spec)}; {place} is not ours, so every task reads them", flush=True)
            return
        fcntl.flock(stamp, fcntl.LOCK_EX)  # of tasks that start at once one reads, the others wait for it
        found = os.fstat(stamp.fileno())
        if found.st_size and 0 <= (age := time.time() - found.st_mtime) < SECONDS:
            print(f"model files: sha256 right {age / 60:.0f} min ago on this node", flush=True)
            return
        said = check_bytes(spec)
        with suppress(OSError):
            stamp.write(f"{spec.path}: {said}\n")
            stamp.flush()
        print(f"model files: {said}", flush=True)


def _identity(spec: ModelInput) -> str:
    """Of the files as they lie there: a stamp speaks of these alone."""
    stats = [(path.name, path.stat()) for path in model_files(Path(spec.path))]
    facts = [spec.path, spec.fingerprint, spec.files, [(n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in stats]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    found = path.stat()
    return _remembered(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@lru_cache(maxsize=10_000)
def _remembered(path: Path, *as_it_was: int) -> str:
    """Within one process a file that nobody touched is read once."""
    return sha256_file(path)
