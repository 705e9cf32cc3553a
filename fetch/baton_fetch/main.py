"""`baton-fetch`: command line, signals, exit status. 0 everything is there; 2 the user's mistake; 1 anything else.

The last line on stderr says what is wrong and what to do; in a pod it becomes the termination message.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.logs import set_up
from baton_fetch.errors import FetchFailed
from baton_fetch.request import Request
from baton_fetch.run import fetch_into

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LIBRARIES = ("botocore", "urllib3", "httpx2", "huggingface_hub", "filelock")
_LONGEST = 360     # what the operator shows of a last line


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Blocks until the folder is complete, or until SIGINT or SIGTERM."""
    request = _request(sys.argv[1:] if argv is None else argv)
    set_up()
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)     # the last line is ours
    end = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        end.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        fetch_into(request, environment=os.environ, clock=SystemClock(), end=end)
    except FetchFailed as error:
        return _failed(error.message, error.exit_status)
    except BatonError as error:
        return _failed(f"{request.uri}: {error.message}", 1)
    except OSError as error:
        return _failed(_of_the_disk(request, error), 1)
    return 0


def _request(argv: Sequence[str]) -> Request:
    parser = argparse.ArgumentParser(prog="baton-fetch", description="Fetch a checkpoint into a folder; resumes.")
    parser.add_argument("--uri", required=True, help="hf://owner/name, s3://bucket/prefix or baton://demo")
    parser.add_argument("--to", required=True, type=Path, help="folder that will hold config.json and the rest")
    parser.add_argument("--revision", default="", help="branch, tag or commit of an hf:// model; default: main")
    parser.add_argument("--endpoint", default="", help="another hub, or an S3-like server: http(s)://host[:port]")
    parser.add_argument("--only-tokenizer", action="store_true", help="leave the weights out")
    given = parser.parse_args(argv)
    return Request(
        uri=given.uri, folder=given.to, revision=given.revision, endpoint=given.endpoint,
        only_tokenizer=given.only_tokenizer,
    )  # fmt: skip


def _of_the_disk(request: Request, error: OSError) -> str:
    where = f"{request.uri}: {request.folder}"
    if error.errno in _FULL:
        return f"{where} is full; give the model volume more room; what is fetched is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} cannot be written ({error.strerror}); check the volume's permissions and fsGroup"
    return f"{where}: {' '.join(str(error).split())}"


def _failed(message: str, status: int) -> int:
    line = f"baton-fetch: {' '.join(message.split())}"
    sys.stderr.write(f"{line if len(line) <= _LONGEST else f'{line[:_LONGEST]}...'}\n")
    return status
