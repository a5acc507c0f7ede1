"""An S3 API on loopback: moto's server in a process of its own, and a bad connection to it."""

import itertools
import json
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.app import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
# Nobody checks it, but a caller without one is a stranger.
_SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/{service}/aws4_request, SignedHeaders=host, Signature=0"


@dataclass(frozen=True)
class S3:
    endpoint: str

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}

    def bucket(self, name: str) -> str:
        """The URI of a new bucket."""
        self.ask("PUT", f"/{name}")
        return f"s3://{name}"

    def put(self, uri: str, content: bytes) -> None:
        """An object that is none of our code's."""
        self.ask("PUT", uri.removeprefix("s3:/"), content)

    def ask(self, method: str, path: str, body: bytes | None = None, service: str = "s3") -> bytes:
        form = "application/x-www-form-urlencoded" if service == "iam" else "text/plain"
        headers = {"Content-Type": form, "Authorization": _SIGNED.format(service=service)}
        asked = urllib.request.Request(self.endpoint + path, body, headers, method=method)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.read()

    @contextmanager
    def only_reading(self, name: str) -> Iterator[dict[str, str]]:
        """Rights are enforced inside; yields the environment of a user who may read and list alone."""
        policy = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
        self._manage("CreateUser", UserName=name)
        self._manage("PutUserPolicy", UserName=name, PolicyName="reads", PolicyDocument=document)
        made = self._manage("CreateAccessKey", UserName=name)
        names = {"AWS_ACCESS_KEY_ID": "AccessKeyId", "AWS_SECRET_ACCESS_KEY": "SecretAccessKey"}
        self.ask("POST", "/moto-api/reset-auth", b"0")
        try:
            yield {variable: re.findall(f"<{tag}>(.*)</{tag}>", made)[0] for variable, tag in names.items()}
        finally:
            self.ask("POST", "/moto-api/reset-auth", b"inf")

    def _manage(self, action: str, **parameters: str) -> str:
        """A call of Amazon's service of users and rights."""
        given = urllib.parse.urlencode({"Action": action, "Version": "2010-05-08", **parameters})
        return self.ask("POST", "/", given.encode(), service="iam").decode()


@contextmanager
def s3_server(log: Path, host: str = "127.0.0.1") -> Iterator[S3]:
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(words, stdout=file, stderr=file)
    s3 = S3(f"http://{host}:{port}")
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            with suppress(OSError):
                s3.ask("GET", "/moto-api/")
                break
            time.sleep(0.1)
        yield s3
    finally:
        server.kill()
        server.wait()


class _Cutting(socketserver.ThreadingTCPServer):
    """Passes on what comes, but hangs up on the second caller and on the fourth."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Pipe)
        self.target, self.calls, self.cut = target, itertools.count(1), 0


class _Pipe(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        if next(self.server.calls) in (2, 4):
            self.request.recv(100)
            self.server.cut += 1
            return
        with socket.create_connection(self.server.target) as server:
            back = threading.Thread(target=_pass_on, args=(server, self.request), daemon=True)
            back.start()
            _pass_on(self.request, server)
            back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def bad_connection(s3: S3) -> Iterator[_Cutting]:
    """A way to the server on which connections are lost; `cut` counts them."""
    host, _, port = s3.endpoint.removeprefix("http://").partition(":")
    with _Cutting((host, int(port))) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()


# ---- folders to compare


def files(folder: Path) -> dict[str, bytes]:
    """Path → content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, contents: dict[str, str]) -> Path:
    """A folder of these texts and of nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
