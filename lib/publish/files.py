"""Files of a repository, and what the Hub would say of them: a large one goes by its sha256, another by git's id."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lib.base.atomic import open_file

BLOCK = 1 << 20


@dataclass(frozen=True)
class File:
    path: str  # in the repository
    content: Path | bytes
    size: int
    sha256: str
    blob: str


def from_bytes(path: str, data: bytes) -> File:
    return File(path, data, len(data), hashlib.sha256(data).hexdigest(), _git(len(data), data).hexdigest())


def from_disk(path: str, source: Path) -> File:
    """Read once, for both."""
    size = source.stat().st_size
    sha, blob = hashlib.sha256(), _git(size)
    with open_file(source) as f:
        while data := f.read(BLOCK):
            sha.update(data)
            blob.update(data)
    return File(path, source, size, sha.hexdigest(), blob.hexdigest())


def _git(size: int, data: bytes = b"") -> "hashlib._Hash":
    found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    found.update(data)
    return found
