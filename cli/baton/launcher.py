"""Ties a process to the life of its supervisor, then becomes the real program.

Run as a script: `python -I -S launcher.py SUPERVISOR_PID PROGRAM [ARGUMENT ...]`. The kernel kills the program when the
supervisor ends in whatever way, kill -9 included, so nothing is ever left behind. SIGKILL, because a worker that hangs
would outlive anything gentler, and a supervisor that could still be gentle has already sent SIGTERM. Imports only the
standard library and no site-packages: it costs some 20 ms. Where there is no prctl (not Linux) it only starts PROGRAM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    supervisor, program = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died before the line above
            sys.exit("the supervisor is gone")
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
