"""Host memory for large arrays that are read and written in pieces all over."""

from __future__ import annotations

import mmap
from contextlib import suppress


def large_pages(size: int) -> mmap.mmap:
    """`size` bytes of zeros, private to this process, taken as they are written; gone with the last view of them.

    In large pages where the kernel has them: fewer faults, fewer misses in address translation. Raises OSError.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
