"""`baton chat`: a conversation on a terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""

from __future__ import annotations

import importlib
import sys
from contextlib import closing, suppress

from rich.console import Console

from baton.chat_client import ChatClient, ChatFailed, Message, Sampling

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


class Chat:
    """One conversation. Answers go to standard output as they come; what they cost goes to `console`."""

    def __init__(
        self, client: ChatClient, model: str, *, system: str | None, sampling: Sampling, console: Console
    ) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._console = console
        self._start = [] if system is None else [Message(role="system", content=system)]
        self.messages = list(self._start)

    def answer(self, text: str) -> str:
        """Ask, print the answer while it streams, remember both. Raises ChatFailed; then nothing is remembered."""
        question = Message(role="user", content=text)
        pieces: list[str] = []
        with closing(self._client.ask(self._model, [*self.messages, question], self._sampling)) as stream:
            for piece in stream:
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._console.print(
            str(self._client.last_cost), style="dim", markup=False, highlight=False, soft_wrap=True
        )
        answer = "".join(pieces)
        self.messages += [question, Message(role="assistant", content=answer)]
        return answer

    def converse(self) -> None:
        """Read questions until the end of input."""
        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):    # line editing and history in `input`, where this Python has them
                importlib.import_module("readline")
            self._console.print(f"{self._model}: {_HELP}", style="dim", markup=False, highlight=False)
        while True:
            try:
                text = input("> " if interactive else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._console.print()
                continue
            if text == "/exit":
                return
            if text == "/reset":
                self.messages = list(self._start)
            elif text.startswith("/"):
                self._console.print(_HELP, style="dim", markup=False, highlight=False)
            elif text:
                self._one(text)

    def _one(self, text: str) -> None:
        try:
            self.answer(text)
        except KeyboardInterrupt:
            self._console.print("\n(stopped, and not kept in the conversation)", style="dim")
        except ChatFailed as error:
            self._console.print(f"\n{error.message}", style="red", markup=False, highlight=False)
