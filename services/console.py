"""Talking to a model in the terminal."""

import sys
from typing import Any

from services.client import CallError, Client

CUT = "(cut: the answer has all of max_new_tokens, or fills the model's context)"
HELP = "/new starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


class Conversation:
    """What was said so far, and the client to go on with. A turn that fails is forgotten."""

    def __init__(self, client: Client, model: str, system: str, knobs: dict[str, Any]) -> None:
        self._client, self._model, self._knobs = client, model, knobs
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def start_over(self) -> None:
        self._messages = list(self._opening)

    def say(self, text: str) -> None:
        """Prints the answer while it comes, and on stderr that it was cut, where it was.

        Raises CallError; Ctrl-C cancels the answer and passes through.
        """
        asked = [*self._messages, {"role": "user", "content": text}]
        with self._client.stream_chat(asked, model=self._model, **self._knobs) as stream:
            try:
                for piece in stream:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            finally:
                print(flush=True)
        if stream.reply.finish_reason == "length":
            print(CUT, file=sys.stderr)
        self._messages = [*asked, {"role": "assistant", "content": stream.reply.text}]


def converse(conversation: Conversation) -> None:
    """Asks and answers until the end of the input."""
    import readline  # noqa: F401 - gives input() its line editing and history

    print(HELP)
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return
        if text == "/quit":
            return
        if text == "/new":
            conversation.start_over()
        elif text:
            _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    try:
        conversation.say(text)
    except CallError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("(stopped)")
