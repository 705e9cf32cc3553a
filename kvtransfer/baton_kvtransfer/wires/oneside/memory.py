"""Host memory that a peer can write at any time, and its end: quarantine.

No transfer library can be told to stop, so memory that was announced once is never unmapped and never used again: its
pages go back to the system, its addresses stay reserved until the process ends, and late bytes land where nobody reads.
Address space is the price: 128 TiB are enough for millions of links.
"""

from __future__ import annotations

import ctypes
import mmap

from baton_common.memory import large_pages
from baton_kvtransfer.errors import WireError
from baton_kvtransfer.wires.oneside.engine import Region


class SlotMemory:
    def __init__(self, size: int) -> None:
        """Raises WireError when the system has none."""
        try:
            self._map = large_pages(size)
        except OSError as error:
            raise WireError(f"no memory for {size} bytes of slots: {error.strerror}") from error
        self.region = Region(address=ctypes.addressof(ctypes.c_char.from_buffer(self._map)), bytes=size)
        self.view = memoryview(self._map)

    def pin(self) -> None:
        """From now on the mapping outlives everything but the process."""
        self.view = memoryview(b"")
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._map))

    def empty(self) -> None:
        """Give the pages back; the addresses stay valid. Not while a device may hold them registered."""
        self._map.madvise(mmap.MADV_DONTNEED)
