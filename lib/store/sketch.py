"""A file in memory that holds only what was written to it: what lies between takes no room."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

BLOCK = 1 << 14


class Sketch(io.RawIOBase):
    """As much of a file as h5py asks of one."""

    def __init__(self) -> None:
        self.blocks: dict[int, bytearray] = {}
        self.at = self.size = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None) -> int:
        """Only ever to a size that nothing was written beyond."""
        self.size = self.at if size is None else size
        return self.size

    def write(self, given: "ReadableBuffer", /) -> int:
        data, done = memoryview(given), 0
        while done < len(data):
            number, at = divmod(self.at + done, BLOCK)
            part = data[done : done + BLOCK - at]
            self.blocks.setdefault(number, bytearray(BLOCK))[at : at + len(part)] = part
            done += len(part)
        self.at += done
        self.size = max(self.size, self.at)
        return done

    def readinto(self, given: "WriteableBuffer", /) -> int:
        buffer = memoryview(given)
        data = self.cut(self.at, min(self.at + len(buffer), self.size))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def cut(self, start: int, stop: int) -> bytes:
        """A stretch of the file; zeros where nothing was written."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        blocks = b"".join(bytes(self.blocks.get(number, BLOCK)) for number in range(first, last))
        return blocks[start - first * BLOCK : stop - first * BLOCK]
