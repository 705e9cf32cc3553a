"""The end of a process that moved KV. It does not know what the process was."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from baton_kvtransfer.wires.oneside import nixl


def leave(status: int) -> NoReturn:
    """Call last, with everything closed. Where NIXL was loaded, its exit handlers are passed by: on some systems they
    crash (in a library that it brings), and every clean stop would look like a failure to whoever supervises.
    """
    if nixl.is_loaded():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
