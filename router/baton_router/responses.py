"""Calls to OpenAI JSON: whole answers and stream events. Pure formatting; the constant part of an event is made once.

A stream event is `data: {json}\\n\\n`. Events of one step are joined by the caller into one write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from baton_router.call import Call
from baton_router.detokenise import Vocabulary
from baton_router.output import ChoiceOutput, Delta, ShownLogprob

DONE = b"data: [DONE]\n\n"


class Writer:
    """Formats one call."""

    def __init__(self, call: Call, vocabulary: Vocabulary) -> None:
        self._call = call
        self._vocabulary = vocabulary
        info = call.info
        self._chat = info.chat
        kind = ("chat.completion.chunk" if info.chat else "text_completion") if info.stream else (
            "chat.completion" if info.chat else "text_completion"
        )  # fmt: skip
        self._head: dict[str, Any] = {
            "id": info.call_id, "object": kind, "created": info.created_s, "model": info.model,
        }  # fmt: skip
        head = orjson.dumps(self._head)[:-1]
        self._prefix = b"data: " + head + b',"choices":[{"index":'
        self._suffix = (b',"usage":null' if info.include_usage else b"") + b"}\n\n"

    # ---- streams

    def events(self, output: ChoiceOutput) -> bytes:
        """Everything new of one choice; empty when there is nothing."""
        delta = output.take()
        if delta is None:
            return b""
        made = b""
        if self._chat and not output.opened:
            made = self._event(output, b'{"role":"assistant","content":"","refusal":null}', b"null", None)
        output.opened = True
        logprobs = b"null"
        if self._call.info.logprobs and delta.logprobs:
            logprobs = orjson.dumps(self._logprobs(delta.logprobs))
        if delta.text or delta.logprobs or not self._chat:
            reason = None if self._chat else delta.finish_reason
            text = orjson.dumps(delta.text)
            made += self._event(output, b'{"content":' + text + b"}" if self._chat else text, logprobs, reason)
        if self._chat and delta.finish_reason is not None:
            made += self._event(output, b"{}", b"null", delta.finish_reason)
        return made

    def _event(self, output: ChoiceOutput, body: bytes, logprobs: bytes, reason: str | None) -> bytes:
        field = b',"delta":' if self._chat else b',"text":'
        end = b'"%b"' % reason.encode() if reason is not None else b"null"
        return b'%b%d%b%b,"logprobs":%b,"finish_reason":%b}]%b' % (
            self._prefix, output.index, field, body, logprobs, end, self._suffix,
        )  # fmt: skip

    def closing(self) -> bytes:
        """Usage, if asked for, and the end mark."""
        if not self._call.info.include_usage:
            return DONE
        return b"data: " + orjson.dumps({**self._head, "choices": [], "usage": self._usage()}) + b"\n\n" + DONE

    # ---- whole answers

    def whole(self) -> bytes:
        """The JSON body of an answer that is not streamed; the call has ended without an error."""
        choices = [self._choice(output) for output in self._call.outputs]
        return orjson.dumps({**self._head, "choices": choices, "usage": self._usage()})

    def _choice(self, output: ChoiceOutput) -> dict[str, Any]:
        delta = output.take() or Delta(text="", logprobs=(), finish_reason=output.finish_reason)
        shown = self._logprobs(delta.logprobs) if self._call.info.logprobs else None
        rest = {"logprobs": shown, "finish_reason": output.finish_reason}
        if self._chat:
            message = {"role": "assistant", "content": delta.text, "refusal": None}
            return {"index": output.index, "message": message, **rest}
        return {"index": output.index, "text": delta.text, **rest}

    def _usage(self) -> dict[str, Any]:
        call = self._call
        return {
            "prompt_tokens": call.info.prompt_tokens,
            "completion_tokens": call.output_tokens,
            "total_tokens": call.info.prompt_tokens + call.output_tokens,
            "prompt_tokens_details": {"cached_tokens": call.cached_tokens},
        }

    # ---- logprobs

    def _logprobs(self, items: Sequence[ShownLogprob]) -> dict[str, Any]:
        return self._chat_logprobs(items) if self._chat else self._completion_logprobs(items)

    def _chat_logprobs(self, items: Sequence[ShownLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._entry(item.token_id, item.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in item.top],
            }
            for item in items
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._vocabulary.token_text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    def _completion_logprobs(self, items: Sequence[ShownLogprob]) -> dict[str, Any]:
        def text(token_id: int) -> str:
            return self._vocabulary.token_text(token_id)[0]

        tops: list[dict[str, float]] | None = None
        if self._call.info.top_logprobs:
            tops = [{text(token_id): _finite(value) for token_id, value in item.top} for item in items]
        return {
            "tokens": [text(item.token_id) for item in items],
            "token_logprobs": [_finite(item.logprob) for item in items],
            "top_logprobs": tops,
            "text_offset": [item.offset for item in items],
        }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot occur."""
    return logprob if logprob > -9999.0 else -9999.0
