"""The end of a process that moved KV. It does not know what the process was."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from baton_kvtransfer.tiers import mooncake as store
from baton_kvtransfer.wires.oneside import nixl


def leave(status: int) -> NoReturn:
    """Call last, with everything closed. Where a transfer library was loaded, exit handlers are passed by. Those of
    NIXL crash on some systems (in a library that it brings), and every clean stop would look like a failure to whoever
    supervises; those of a Mooncake store's client wait for its master, also for one that is gone.
    """
    if nixl.is_loaded() or store.is_loaded():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
