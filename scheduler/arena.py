"""Shared memory for tensors: a memfd, and a buddy allocator over it.

Tensor bytes are written here once, when they arrive, and are read here by the worker. A memfd has no name,
leaves nothing behind, and is not bounded by the size of /dev/shm. It is sparse: pages cost memory once used.
"""

from __future__ import annotations

import mmap
import os
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

MIN_BLOCK = 256


class ArenaFullError(MemoryError):
    """No room for a slot now."""


class SharedMemory:
    """`size` bytes of memory that other processes can map by the file descriptor `fd`."""

    def __init__(self, name: str, size: int) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.memory = memoryview(mmap.mmap(self.fd, size))

    def close(self) -> None:
        self.memory.release()
        os.close(self.fd)


class Descriptor:
    """A SharedMemory's file descriptor, as an argument of a process that is being started."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], Descriptor], tuple[Any]]:
        return _received, (DupFd(self._fd),)

    def attach(self, *, writable: bool) -> memoryview:
        """Maps the memory, once."""
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        memory = memoryview(mmap.mmap(self._fd, os.fstat(self._fd).st_size, access=access))
        os.close(self._fd)
        return memory


def _received(duplicate: Any) -> Descriptor:
    return Descriptor(duplicate.detach())


class Arena(SharedMemory):
    """Shared memory divided into slots.

    A binary buddy allocator: blocks are powers of two, a freed block joins its free neighbour. Freed blocks
    are first kept as they are, by size, since the next request most likely wants the same size; they are
    joined only when a size runs out.
    """

    def __init__(self, size: int) -> None:
        """`size` in bytes, a power of two."""
        if size < MIN_BLOCK or size & (size - 1):
            raise ValueError(f"arena size must be a power of two of at least {MIN_BLOCK} bytes, not {size}")
        super().__init__("migserve-arena", size)
        self.size = size
        self.used = 0
        self._free: dict[int, set[int]] = defaultdict(set)  # block size -> offsets, buddies joined
        self._free[size].add(0)
        self._recent: dict[int, list[int]] = defaultdict(list)  # block size -> offsets, not joined yet
        self._taken: dict[int, int] = {}  # offset -> block size

    def allocate(self, nbytes: int) -> int:
        """Offset of a slot of at least `nbytes`. Raises ArenaFullError."""
        block = max(MIN_BLOCK, 1 << (nbytes - 1).bit_length()) if nbytes > 0 else MIN_BLOCK
        recent = self._recent.get(block)
        offset = recent.pop() if recent else self._split(block)
        self._taken[offset] = block
        self.used += block
        return offset

    def free(self, offset: int) -> None:
        """Gives a slot back. Raises KeyError if it is not taken."""
        block = self._taken.pop(offset)
        self.used -= block
        self._recent[block].append(offset)

    def _split(self, block: int) -> int:
        size = self._smallest_free(block)
        if size is None:
            self._join_recent()
            size = self._smallest_free(block)
        if size is None:
            raise ArenaFullError(f"no room for {block} bytes: {self.used} of {self.size} are in use")
        offset = self._free[size].pop()
        while size > block:
            size //= 2
            self._free[size].add(offset + size)
        return offset

    def _smallest_free(self, block: int) -> int | None:
        while block <= self.size:
            if self._free[block]:
                return block
            block *= 2
        return None

    def _join_recent(self) -> None:
        for block, offsets in list(self._recent.items()):
            for offset in offsets:
                self._join(offset, block)
        self._recent.clear()

    def _join(self, offset: int, block: int) -> None:
        while block < self.size and (offset ^ block) in self._free[block]:
            self._free[block].remove(offset ^ block)
            offset &= ~block
            block *= 2
        self._free[block].add(offset)
