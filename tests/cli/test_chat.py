"""The chat client against a server that says exactly what the test wants."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from baton.chat import Chat
from baton.chat_client import ChatClient, ChatFailed, Cost, Message, Sampling
from baton_common.clock import ManualClock, SystemClock


def piece(text: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def usage(prompt: int, cached: int, completion: int) -> dict[str, object]:
    details = {"cached_tokens": cached}
    return {
        "choices": [],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details},
    }


class Server:
    """Answers every chat request with `events`, and remembers the requests."""

    def __init__(self) -> None:
        self.events: list[dict[str, object] | str] = []
        self.status = 200
        self.requests: list[dict[str, object]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                script.requests.append(json.loads(body))
                if script.status != 200:
                    self._send(script.status, json.dumps(script.events[0]).encode())
                    return
                lines = [event if isinstance(event, str) else json.dumps(event) for event in script.events]
                self._send(200, "".join(f"data: {line}\n\n" for line in lines).encode())

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


@pytest.fixture
def client(server: Server) -> Iterator[ChatClient]:
    made = ChatClient(server.url, SystemClock())
    yield made
    made.close()


ASK = (Message(role="user", content="hi"),)


def test_an_answer_is_streamed_and_its_cost_known(server: Server, client: ChatClient) -> None:
    server.events = [piece(""), piece("Hel"), piece("lo", "stop"), usage(10, 4, 3), "[DONE]"]
    assert list(client.ask("tiny", ASK, Sampling(max_tokens=5, temperature=0.0))) == ["Hel", "lo"]
    assert client.last_cost is not None
    assert (client.last_cost.prompt_tokens, client.last_cost.cached_tokens) == (10, 4)
    assert (client.last_cost.completion_tokens, client.last_cost.finish_reason) == (3, "stop")
    assert server.requests == [
        {
            "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True,
            "stream_options": {"include_usage": True}, "max_completion_tokens": 5, "temperature": 0.0,
        }
    ]  # fmt: skip


def test_time_to_first_token_and_speed_come_from_the_clock(server: Server) -> None:
    clock = ManualClock()
    client = ChatClient(server.url, clock)
    server.events = [piece("a"), piece("b"), piece("c"), usage(1, 0, 3), "[DONE]"]
    answer = client.ask("tiny", ASK, Sampling())
    for _ in answer:
        clock.advance(0.5)
    client.close()
    assert client.last_cost is not None
    assert client.last_cost.ttft_s == 0.0
    assert client.last_cost.tokens_per_s == pytest.approx(2.0)


def test_a_cost_is_one_line_and_leaves_out_what_is_not_known() -> None:
    known = Cost(
        ttft_s=0.0123, total_s=1.0123, prompt_tokens=12, cached_tokens=8, completion_tokens=11, finish_reason="length"
    )
    assert str(known) == "TTFT 12 ms · 10.0 tok/s · 11 tokens · prompt 12, cached 8 · cut off at the token limit"
    unknown = Cost(
        ttft_s=0.5, total_s=0.5, prompt_tokens=None, cached_tokens=None, completion_tokens=None, finish_reason="stop"
    )
    assert str(unknown) == "TTFT 500 ms"


def test_a_refusal_is_passed_on_with_its_status(server: Server, client: ChatClient) -> None:
    server.status, server.events = 429, [{"error": {"message": "too many requests; try again in 2 s"}}]
    with pytest.raises(ChatFailed, match=r"too many requests; try again in 2 s \(HTTP 429\)"):
        list(client.ask("tiny", ASK, Sampling()))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([piece("a")], "ended before the answer did"),
        ([piece("a"), {"error": {"message": "decode worker lost"}}], "decode worker lost"),
        (["{no json"], "no answer"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error_after_the_pieces_that_came(
    server: Server, client: ChatClient, events: list[dict[str, object] | str], message: str
) -> None:
    server.events = events
    with pytest.raises(ChatFailed, match=message):
        list(client.ask("tiny", ASK, Sampling()))


def test_where_nothing_listens_the_message_says_what_to_start() -> None:
    client = ChatClient("http://127.0.0.1:9", SystemClock())
    with pytest.raises(ChatFailed, match="baton up"):
        client.model()
    client.close()


def test_a_conversation_sends_all_turns_and_forgets_a_failed_one(
    server: Server, client: ChatClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.events = [piece("one", "stop"), usage(3, 0, 1), "[DONE]"]
    notes = io.StringIO()
    console = Console(file=notes, width=100)
    talk = Chat(client, client.model(), system="be short", sampling=Sampling(), console=console)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n/reset\nthird\n/exit\nnever\n"))
    talk.converse()
    sent = [[message["content"] for message in request["messages"]] for request in server.requests]  # type: ignore[attr-defined]
    assert sent == [["be short", "first"], ["be short", "first", "one", "second"], ["be short", "third"]]
    assert capsys.readouterr().out == "one\n" * 3
    server.events = [piece("half")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("fourth\n"))
    talk.converse()
    assert "ended before the answer did" in notes.getvalue()
    assert [message.content for message in talk.messages] == ["be short", "third", "one"]
