"""Ray's dashboard over HTTP, as far as jobs need it: their list, their logs, packages, submit and stop.

Plain requests with a time limit each, so that a machine which only submits needs no Ray, and a connection that is cut
is noticed. Every failure is a ClusterError or a JobError, one line that names the cause.
"""

import http.client
import json
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

RAY = "2.60"  # what the code is made for; pyproject pins it
TIMEOUT = 20.0  # seconds without an answer
_SLOWEST = 100_000  # bytes per second of an upload that is still waited for
RUN, RECIPE = "chatforge_run", "chatforge_recipe"  # a job's metadata


class JobError(ValueError):
    """A mistake of the caller: an address, a name, a setting; the message says which and what would be right."""


class ClusterError(RuntimeError):
    """What the cluster, or the way to it, refused; `code` is UNAVAILABLE where trying again may help."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Job:
    """What the cluster knows of a job."""

    id: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    run: str = ""  # and recipe: empty where `chatforge submit` did not start it
    recipe: str = ""
    message: str = ""
    exit_code: int | None = None  # of the driver, negative for a signal; none where it did not end by itself
    started: float = 0.0  # seconds since 1970
    ended: float | None = None

    @property
    def is_over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class Dashboard:
    """One cluster's dashboard."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address
        self._headers = {"User-Agent": "chatforge", **({"Authorization": f"Bearer {token}"} if token else {})}

    def check(self) -> None:
        """That a Ray dashboard answers, lets us in, and is of the version which the code is made for."""
        version = self._json("GET", "/api/version").get("ray_version")
        if not isinstance(version, str):
            raise self._not_ray("its /api/version names no ray_version")
        if not version.startswith(f"{RAY}."):
            raise JobError(
                f"{self.address}: the cluster runs Ray {version}, and this code needs {RAY}: give its nodes an image "
                "made from this code's own Dockerfile, or install that version on them"
            )

    def jobs(self) -> list[Job]:
        """Every job that was submitted, the oldest first."""
        listed = self._json("GET", "/api/jobs/")
        if not isinstance(listed, list):
            raise self._not_ray("its /api/jobs/ is no list")
        jobs = (_job(fields) for fields in listed if fields.get("submission_id"))
        return sorted(jobs, key=lambda job: job.started)

    def job(self, job_id: str) -> Job | None:
        """None where the cluster does not know it, as after a restart of its head."""
        answer = self._request("GET", f"/api/jobs/{quote(job_id)}", passing=(404,))
        return None if answer.status == 404 else _job(self._decoded(answer))

    def log(self, job_id: str) -> str | None:
        """All that the job has printed; None where it cannot be read, now or at all."""
        answer = self._request("GET", f"/api/jobs/{quote(job_id)}/logs", passing=(404, 500))
        return str(self._decoded(answer)["logs"]) if answer.status == 200 else None

    def upload(self, uri: str, data: bytes) -> bool:
        """Whether it had to be sent: the cluster may have it already."""
        path = f"/api/packages/{uri.replace('://', '/')}"
        if self._request("GET", path, passing=(404,)).status == 200:
            return False
        self._request("PUT", path, data)
        return True

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> bool:
        """False where there is a job of that id already, which is then left alone."""
        body = {"submission_id": job_id, "entrypoint": entrypoint, "runtime_env": runtime_env, "metadata": metadata}
        answer = self._request("POST", "/api/jobs/", json.dumps(body).encode(), passing=(400, 500))
        if answer.status == 200:
            return True
        if "already exists" in answer.text:
            return False
        raise self._refused(answer, "POST")

    def stop(self, job_id: str) -> None:
        """Asks for it and returns at once."""
        self._request("POST", f"/api/jobs/{quote(job_id)}/stop", b"")

    def _json(self, method: str, path: str) -> Any:
        return self._decoded(self._request(method, path))

    def _decoded(self, answer: "_Answer") -> Any:
        try:
            return json.loads(answer.text)
        except ValueError:
            raise self._not_ray(f"its answer begins with {answer.text[:30]!r}") from None

    def _request(self, method: str, path: str, data: bytes | None = None, passing: tuple[int, ...] = ()) -> "_Answer":
        """The answer, where its status is 200 or one of `passing`; raises ClusterError or JobError for any other."""
        request = urllib.request.Request(self.address + path, data, self._headers, method=method)
        if data:
            request.add_header("Content-Type", "application/json" if method == "POST" else "application/zip")
        timeout = TIMEOUT + len(data or b"") / _SLOWEST  # Python's is for the sending as a whole
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                answer = _Answer(response.status, response.read().decode("utf-8", "replace"))
        except urllib.error.URLError as error:
            raise self._unreachable(error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        if answer.status != 200 and answer.status not in passing:
            raise self._refused(answer, method)
        return answer

    def _unreachable(self, error: object) -> ClusterError | JobError:
        """Nobody there, nobody who speaks HTTP, or somebody who has gone."""
        match error:
            case socket.gaierror():
                host = urlsplit(self.address).hostname
                return ClusterError("UNAVAILABLE", f"{self.address}: no host {host!r} is known here; see --address")
            case ssl.SSLError():
                return JobError(f"{self.address}: TLS failed ({error.reason or error}); does it speak http, not https?")
            case ConnectionRefusedError():
                return ClusterError("UNAVAILABLE", f"{self.address}: nothing listens there; see --address")
            case TimeoutError():
                return ClusterError("UNAVAILABLE", f"{self.address}: no answer within {TIMEOUT:.0f} s")
            case http.client.BadStatusLine() if not isinstance(error, ConnectionError):
                return self._not_ray("it does not answer in HTTP; Ray's other ports, 6379 and 10001, take no jobs")
        return ClusterError("UNAVAILABLE", f"{self.address}: the connection was lost ({error or type(error).__name__})")

    def _refused(self, answer: "_Answer", method: str) -> ClusterError | JobError:
        """An answer that says no; a question may be asked again, since Ray fails them while it starts."""
        match answer.status:
            case 401:
                return JobError(
                    f"{self.address}: the cluster wants a token: set RAY_AUTH_TOKEN to the one it was started with, or "
                    "RAY_AUTH_TOKEN_PATH to its file"
                )
            case 403:
                return JobError(f"{self.address}: the cluster does not take this token; see RAY_AUTH_TOKEN")
            case 413:
                return ClusterError("RESOURCE_EXHAUSTED", f"{self.address}: what lies between takes no such upload")
            case 301 | 302 | 307 | 308 | 404 | 405:
                return self._not_ray(f"it answers {answer.status}")
            case 502 | 503 | 504:
                return ClusterError("UNAVAILABLE", f"{self.address}: answers {answer.status}: Ray is not up behind it")
        said = known_cause(answer.text) or last_line(answer.text)
        code = "UNAVAILABLE" if method == "GET" else "INTERNAL"
        return ClusterError(code, f"{self.address}: answers {answer.status}: {said}")

    def _not_ray(self, why: str) -> JobError:
        return JobError(f"{self.address}: is not a Ray dashboard ({why}); its address is often http://HEAD:8265")


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Every answer is an answer: none is raised, none is followed elsewhere."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


_OPENER = urllib.request.build_opener(_AnyStatus)


@dataclass(frozen=True)
class _Answer:
    status: int
    text: str


def _job(fields: dict[str, Any]) -> Job:
    metadata = fields.get("metadata") or {}
    return Job(
        id=fields["submission_id"],
        status=fields["status"],
        run=metadata.get(RUN, ""),
        recipe=metadata.get(RECIPE, ""),
        message=fields.get("message") or "",
        exit_code=fields.get("driver_exit_code"),
        started=(fields.get("start_time") or 0) / 1000,
        ended=fields["end_time"] / 1000 if fields.get("end_time") else None,
    )


# ---- where, and who we are


def dashboard_at(address: str | None) -> Dashboard:
    """The dashboard of `--address`, else of RAY_API_SERVER_ADDRESS, else of RAY_ADDRESS where it is http.

    Raises JobError where there is none, or none that can be a dashboard's.
    """
    said = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ""
    in_environment = os.environ.get("RAY_ADDRESS", "")
    if not said and in_environment.startswith(("http://", "https://")):
        said = in_environment
    if not said:
        raise JobError("which cluster? give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    if "://" not in said:
        said = f"http://{said}"
    parts = urlsplit(said)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in said
    except ValueError:
        valid = False
    if not valid:
        raise JobError(f"--address {said}: write it as http://HEAD:8265, where Ray's dashboard listens")
    return Dashboard(said.rstrip("/"), _token())


def _token() -> str | None:
    """What Ray's own clients send: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text("utf-8").strip() or None
    except OSError as error:
        if named:
            raise JobError(f"RAY_AUTH_TOKEN_PATH={named}: {error.strerror}") from None
        return None


# ---- what a failure means

_CAUSES = (
    (
        r"No module named '([\w.]+)'",
        "the cluster's image lacks the Python package {0}: give its nodes an image made from this code's own "
        "Dockerfile, or install chatforge[train] on them",
    ),
    (
        r"Version mismatch: The cluster was started with:\s*Ray: (\S+)\s*Python: (\S+)\s*This process .*?"
        r"Ray: (\S+)\s*Python: (\S+)",
        "the cluster's nodes are not alike: it was started with Ray {0} and Python {1}, the job found Ray {2} and "
        "Python {3}; give every node the same image",
    ),
    (
        r"cannot import name '\w+' from 'typing' \(\S*?python(3\.\d+)",
        "the cluster's image has Python {0}, and this code needs 3.11: give its nodes an image made from this code's "
        "own Dockerfile",
    ),
    (r"No space left on device", "a disk of the cluster is full; make room where its nodes keep /tmp/ray and the runs"),
    (r"sh: (?:line )?\d+: (python\S*): (?:command )?not found", "the cluster's image has no {0} on its PATH"),
)


def known_cause(text: str) -> str | None:
    """One line for a failure that only a person can mend, found near the end of what was printed."""
    end = "\n".join(_lines(text)[-12:])
    for pattern, said in _CAUSES:
        if found := re.search(pattern, end, re.DOTALL):
            return said.format(*found.groups())
    return None


def last_line(text: str) -> str:
    lines = _lines(text)
    return lines[-1][:500] if lines else "it says nothing"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
