"""`baton-fetch` for tests: as a process, or in this one with short times."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from baton_common.clock import SystemClock
from baton_fetch.request import Request
from baton_fetch.run import Limits, fetch_into

QUICK = Limits(contact_s=0.3, give_up_s=1.0, beat_s=0.2, stale_s=1.0)
PATIENT = Limits(contact_s=60.0, give_up_s=60.0, beat_s=0.2, stale_s=1.0)
WAIT_S = 90.0
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json")
UNWANTED = ("README.md", "consolidated.safetensors", "pytorch_model.bin", ".gitattributes")


def fetch(request: Request, *, limits: Limits = PATIENT, environment: Mapping[str, str] | None = None) -> None:
    found = os.environ if environment is None else environment
    fetch_into(request, environment=found, clock=SystemClock(), end=threading.Event(), limits=limits)


def start_fetch(*arguments: str | Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """The program, in an environment like a pod's."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "baton_fetch", *map(str, arguments)],
        env={**base, "AWS_EC2_METADATA_DISABLED": "true", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and everything it wrote."""
    output, _ = process.communicate(timeout=WAIT_S)
    return process.returncode, output


def contents(folder: Path) -> dict[str, bytes]:
    """The files a reader sees, without those of the program itself."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
