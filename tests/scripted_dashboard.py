"""A stand-in for Ray's dashboard on loopback, which says what a test needs it to say."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from services.dashboard import RAY

Answer = tuple[int, Any]  # status, and what is sent as JSON; a text is sent as it is
CUT = (0, "")  # no answer: the connection is closed


class Scripted(ThreadingHTTPServer):
    """A dashboard on loopback that gives each path's answers in turn, the last of them for ever."""

    def __init__(self, answers: dict[str, list[Answer]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = {"GET /api/version": [(200, {"ray_version": f"{RAY}.0"})], **answers}
        self.asked: dict[str, bytes] = {}  # the last body of each
        self.headers: dict[str, str] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"

    def next(self, asked: str) -> Answer:
        answers = self.answers.get(asked) or [(200, "") if "/api/packages/" in asked else (404, "404: Not Found")]
        return answers.pop(0) if len(answers) > 1 else answers[0]


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def respond(self) -> None:
        asked = f"{self.command} {self.path}"
        self.server.asked[asked] = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.headers = dict(self.headers)
        status, said = self.server.next(asked)
        if not status:
            self.close_connection = True
            return
        data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = respond

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def scripted(answers: dict[str, list[Answer]]) -> Iterator[Scripted]:
    with Scripted(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
