"""OpenAI request bodies: types, ranges, and which fields are honoured, ignored or refused.

Every wrong field ends in InvalidRequest whose `param` names it as the client wrote it (`messages[0].role`). Fields that
would change the meaning of the answer but are not supported are refused; the rest of the unknown ones are ignored, so
that clients with extra bookkeeping fields run unchanged. It does not know the model; `sampling` checks against that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton_common.errors import InvalidRequest
from baton_router.template import RESERVED

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_NAME = 256
MAX_TTL_S = 24 * 3600

_REFUSED = (
    "audio", "web_search_options", "functions", "function_call", "regex", "ebnf", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "structured_outputs", "lora_path", "continue_final_message",
)  # fmt: skip

Token = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(BaseModel):
    """How a stream reports usage."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class CacheControl(BaseModel):
    """Keep the KV of this conversation for its next turn. `session` None: named by how the conversation begins."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["ephemeral"]
    ttl: str = "5m"
    session: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None

    def ttl_s(self) -> int:
        """Seconds. Raises InvalidRequest for what is no time, or too long."""
        found = re.fullmatch(r"([1-9][0-9]{0,8})([smh])", self.ttl)
        seconds = int(found[1]) * _UNITS_S[found[2]] if found else 0
        if not 0 < seconds <= MAX_TTL_S:
            raise InvalidRequest(
                f"cache_control.ttl must be a time like 5m, 1h or 90s, {MAX_TTL_S // 3600}h at most, "
                f"got {_shown(self.ttl)}",
                param="cache_control.ttl",
            )
        return seconds


_UNITS_S = {"s": 1, "m": 60, "h": 3600}


class Generation(BaseModel):
    """Fields that chat and plain completions share. Unset is None where the default depends on the endpoint."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    # beyond OpenAI, named as other engines name them
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_control: CacheControl | None = None
    prompt_cache_key: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Message(BaseModel):
    """One turn. Extra keys (reasoning, tool_calls, ...) are handed to the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def template_messages(self) -> list[dict[str, Any]]:
        """Messages as templates expect them: text content joined, `developer` under its older name."""
        found: list[dict[str, Any]] = []
        for index, message in enumerate(self.messages):
            role = "system" if message.role == "developer" else message.role
            content = _text_of(message, f"messages[{index}].content")
            found.append({**(message.model_extra or {}), "role": role, "content": content})
        return found


class CompletionRequest(Generation):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, whatever of the four forms the client used."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return self.prompt  # type: ignore[return-value]  # the union was checked by pydantic


Body = TypeVar("Body", ChatRequest, CompletionRequest)


def parse_chat(body: bytes) -> ChatRequest:
    """Raises InvalidRequest naming the field."""
    request = _parse(ChatRequest, body)
    _check_common(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.tool_choice not in (None, "none", "auto"):
        raise InvalidRequest("forced tool calls are not supported; use tool_choice auto or none", param="tool_choice")
    form = (request.response_format or {}).get("type", "text")
    if form != "text":
        raise InvalidRequest(f"response_format {form!r} is not supported; only text is", param="response_format")
    if any(item != "text" for item in request.modalities or ()):
        raise InvalidRequest("only the modality text is supported", param="modalities")
    reserved = RESERVED.intersection(request.chat_template_kwargs or ())
    if reserved:
        raise InvalidRequest(f"chat_template_kwargs may not set {sorted(reserved)[0]}", param="chat_template_kwargs")
    request.template_messages()
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises InvalidRequest naming the field."""
    request = _parse(CompletionRequest, body)
    _check_common(request)
    prompts = request.prompts()
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if len(prompts) * request.choices > MAX_CHOICES:
        raise InvalidRequest(f"prompts times n may be {MAX_CHOICES} at most", param="n")
    if request.cache_control is not None and len(prompts) > 1:
        raise InvalidRequest("cache_control takes one prompt per request", param="cache_control")
    if request.best_of is not None and request.best_of > request.choices:
        raise InvalidRequest("best_of larger than n is not supported", param="best_of")
    if request.suffix:
        raise InvalidRequest("suffix is not supported", param="suffix")
    if request.echo and request.logprobs is not None:
        raise InvalidRequest("echo together with logprobs is not supported", param="echo")
    return request


def _parse(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidRequest(f"the body is no valid JSON: {first['msg']}") from None
        param = _param(first["loc"], kind)
        if first["type"] == "extra_forbidden":  # no known name, but the one that the client wrote
            param = f"{_param(first['loc'][:-1], kind)}.{str(first['loc'][-1])[:MAX_NAME]}"
        text = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] != "missing":
            text += f", got {_shown(first['input'])}"
        raise InvalidRequest(f"{param or 'body'}: {text}", param=param) from None


def _check_common(request: Generation) -> None:
    extra = request.model_extra or {}
    for name in _REFUSED:
        if extra.get(name) not in (None, False):
            raise InvalidRequest(f"{name} is not supported", param=name)
    stops = request.stops()
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", param="stop")
    if not all(stops):
        raise InvalidRequest("stop strings must not be empty", param="stop")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    if request.cache_control is not None:
        request.cache_control.ttl_s()


def _text_of(message: Message, path: str) -> str | None:
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise InvalidRequest(f"{path} must be text", param=path)
        return None
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            kind = str(part.get("type"))[:40]
            raise InvalidRequest(f"{path}[{index}]: only text parts are supported, got {kind!r}", param=path)
        texts.append(text)
    return "".join(texts)


def _param(location: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    """('messages', 0, 'role') -> messages[0].role; pydantic's names of union members are cut off."""
    parts = (kind, Message, StreamOptions, CacheControl)
    known = {name for part in parts for name in part.model_fields}
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part in known:
            text += f".{part}" if text else part
        else:
            break
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe(kind: type[BaseModel]) -> Mapping[str, Any]:
    """OpenAPI request body of one endpoint."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
