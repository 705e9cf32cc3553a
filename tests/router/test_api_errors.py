"""What bad input, missing workers and overload get: typed OpenAI errors, one clear line, never a traceback."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from router.conftest import CONTEXT_TOKENS, HELLO, MODEL, House, chat_ids, eventually
from router.fake_worker import fault

BAD_CHAT = [
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": CONTEXT_TOKENS}, "max_tokens"),
    ({"max_completion_tokens": CONTEXT_TOKENS}, "max_completion_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"seed": "a"}, "seed"),
    ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
    ({"stop_token_ids": [999999]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"guided_json": {}}, "guided_json"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"cache_control": "ephemeral"}, "cache_control"),
    ({"cache_control": {}}, "cache_control.type"),
    ({"cache_control": {"type": "eternal"}}, "cache_control.type"),
    ({"cache_control": {"type": "ephemeral", "lifetime": "5m"}}, "cache_control.lifetime"),
    ({"cache_control": {"type": "ephemeral", "model": MODEL}}, "cache_control.model"),
    ({"cache_control": {"type": "ephemeral", "ttl": 300}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "ttl": "5"}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "ttl": "0s"}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "ttl": "-5m"}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "ttl": "25h"}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "ttl": "86401s"}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "ttl": "99999999999999999999h"}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "session": ""}}, "cache_control.session"),
    ({"cache_control": {"type": "ephemeral", "session": "x" * 257}}, "cache_control.session"),
    ({"cache_control": {"type": "ephemeral", "session": 7}}, "cache_control.session"),
    ({"prompt_cache_key": 7}, "prompt_cache_key"),
    ({"user": ["me"]}, "user"),
    ({"model": 3}, "model"),
    ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
]


async def test_every_bad_field_is_a_400_that_names_it(house: House, http: httpx.AsyncClient) -> None:
    await house.pair()
    url = await house.serve()
    for change, param in BAD_CHAT:
        body = {"model": MODEL, "messages": HELLO, **change}
        answer = await http.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 400, (change, answer.text)
        error = answer.json()["error"]
        assert error["param"] == param, (change, error)
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    assert not house.workers[1].submits


BAD_COMPLETION = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[1, 2], []]}, "prompt"),
    ({"prompt": [5, 400]}, "prompt"),
    ({"prompt": [-5]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"logprobs": 50}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"prompt": "x " * 600}, "prompt"),
    ({"prompt": ["x"] * 100, "n": 2}, "n"),
]


async def test_bad_completion_fields_are_named_too(house: House, http: httpx.AsyncClient) -> None:
    await house.pair()
    url = await house.serve()
    for change, param in BAD_COMPLETION:
        answer = await http.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "x", **change})
        assert answer.status_code == 400, (change, answer.text)
        assert answer.json()["error"]["param"] == param, (change, answer.text)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": "tiny", "messages": NaN}'])
async def test_malformed_json_is_a_400(house: House, http: httpx.AsyncClient, body: bytes) -> None:
    url = await house.serve([])
    answer = await http.post(f"{url}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert "Traceback" not in answer.text


async def test_a_prompt_beyond_the_context_names_both_lengths(house: House) -> None:
    await house.pair()
    await house.serve()
    messages = [{"role": "user", "content": "x" * 2000}]
    with pytest.raises(openai.BadRequestError) as caught:
        await house.client().chat.completions.create(model=MODEL, messages=messages)
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT_TOKENS) in caught.value.message
    assert str(len(chat_ids(house, messages))) in caught.value.message


async def test_the_shortest_context_of_the_workers_counts(house: House) -> None:
    await house.pair(context_tokens=32)
    await house.serve()
    with pytest.raises(openai.BadRequestError, match="32"):
        await house.client().completions.create(model=MODEL, prompt=[100] * 40)


async def test_an_unknown_model_is_a_404(house: House) -> None:
    await house.pair()
    await house.serve()
    with pytest.raises(openai.NotFoundError) as caught:
        await house.client().chat.completions.create(model="gpt-9", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_unknown_paths_and_methods_get_error_objects(house: House, http: httpx.AsyncClient) -> None:
    url = await house.serve([])
    missing = await http.get(f"{url}/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong = await http.get(f"{url}/v1/chat/completions")
    assert (wrong.status_code, "error" in wrong.json()) == (405, True)


async def test_keys_are_checked_when_there_are_any(house: House, http: httpx.AsyncClient) -> None:
    await house.pair()
    url = await house.serve(api_keys=("secret", "other"))
    with pytest.raises(openai.AuthenticationError):
        await house.client().models.list()
    good = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="other")
    assert (await good.models.list()).data
    assert (await http.get(f"{url}/health")).status_code == 200


async def test_no_worker_is_a_503_that_says_why(house: House) -> None:
    await house.serve(["127.0.0.1:1"], worker_wait_s=0.1)
    with pytest.raises(openai.InternalServerError) as caught:
        await house.client().chat.completions.create(model=MODEL, messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "no_worker")
    assert "127.0.0.1:1" in caught.value.message
    assert caught.value.response.headers["retry-after"] == "1"


async def test_overload_everywhere_is_a_429_with_retry_after(house: House) -> None:
    _, decode = await house.pair()
    decode.script.refuse_always = fault("overloaded", retry_after_ms=2500)
    await house.serve()
    with pytest.raises(openai.RateLimitError) as caught:
        await house.client().chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "3"


async def test_too_many_requests_in_flight_are_a_429(house: House) -> None:
    _, decode = await house.pair()
    decode.script.hold = True
    await house.serve(max_inflight=1)
    client = house.client()
    first = asyncio.create_task(client.completions.create(model=MODEL, prompt="x", max_tokens=3))
    await eventually(lambda: bool(decode.submits), "the first is in flight")
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model=MODEL, prompt="x")
    decode.script.hold = False
    assert (await first).choices[0].finish_reason == "length"


async def test_the_deadline_ends_a_waiting_request_with_504(house: House) -> None:
    prefill, decode = await house.pair()
    decode.script.hold = prefill.script.hold = True
    await house.serve(request_timeout_s=0.2)
    with pytest.raises(openai.InternalServerError) as caught:
        await house.client().completions.create(model=MODEL, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    await eventually(lambda: bool(decode.aborts and prefill.aborts), "both workers were told")


async def test_the_deadline_ends_a_started_stream_with_an_error_event(house: House) -> None:
    await house.pair(tick_s=0.02)
    await house.serve(request_timeout_s=0.3)
    stream = await house.client().completions.create(model=MODEL, prompt="x", max_tokens=400, stream=True)
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert "deadline" in caught.value.message


async def test_a_defect_is_a_500_without_a_traceback(
    house: House, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.pair()
    url = await house.serve()
    assert house.router is not None

    def broken(*_: object) -> None:
        raise RuntimeError("inner detail")

    monkeypatch.setattr(house.router, "_call", broken)
    answer = await http.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "inner detail" not in answer.text
    assert "Traceback" not in answer.text
