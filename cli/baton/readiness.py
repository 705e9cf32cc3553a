"""Asks a router whether it can serve, and why not. Standard library only: the supervisor stays small."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    ready: bool
    reason: str    # one line; empty when ready


def ask(url: str, timeout_s: float) -> Readiness:
    """GET `url`/ready. Blocks up to `timeout_s`; never raises: who does not answer is not ready."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        body = answer.read(65536)
    except (OSError, http.client.HTTPException) as error:
        return Readiness(ready=False, reason=f"the router does not answer yet ({type(error).__name__})")
    finally:
        connection.close()
    return Readiness(ready=True, reason="") if answer.status == 200 else Readiness(ready=False, reason=_reason(body))


def _reason(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return "the router gives no reason"
    reasons = answer.get("reasons") if isinstance(answer, dict) else None
    return "; ".join(str(reason) for reason in reasons) if isinstance(reasons, list) and reasons else "no reason given"
