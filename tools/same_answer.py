"""Checks that a chat answer and its streamed form are the same, not empty, and ended properly. For the smoke test."""

from __future__ import annotations

import json
import sys


def streamed_text(stream: str) -> tuple[str, str | None]:
    """(text, finish reason) of a server-sent event stream. Raises ValueError when it has no proper end."""
    data = [line.removeprefix("data:").strip() for line in stream.splitlines() if line.startswith("data:")]
    if not data or data[-1] != "[DONE]":
        raise ValueError("the stream does not end with [DONE]")
    choices = [choice for item in data[:-1] for choice in json.loads(item)["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, next((choice["finish_reason"] for choice in choices if choice.get("finish_reason")), None)


def main(whole: str, stream: str) -> int:
    choice = json.loads(whole)["choices"][0]
    expected = (choice["message"]["content"], choice["finish_reason"])
    found = streamed_text(stream)
    if found != expected or not found[0].strip():
        sys.stderr.write(f"the whole answer is {expected}, the streamed one {found}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
