"""What a dying worker leaves behind: one JSON file with the last plan, request phases, page ledger and the traceback.

No prompts, no tokens: the engine's dump has none, and nothing else is added here.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path


def write_dump(
    folder: Path, *, worker_id: str, incarnation: str, error: BaseException, engine: Mapping[str, object]
) -> Path:
    """Write the file and return its path. Raises OSError when the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"baton-crash-{worker_id.replace(':', '-').replace('/', '-')}-{incarnation}.json"
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "worker_id": worker_id,
        "incarnation": incarnation,
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exception(error),
        "engine": engine,
    }
    path.write_text(json.dumps(record, indent=1, default=str))
    return path
