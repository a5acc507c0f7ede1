"""Which dashboard is meant, and what it means when it or a job says no."""

import socket
import threading
from pathlib import Path

import pytest
from scripted_dashboard import CUT, scripted

from services.app import free_port
from services.dashboard import RAY, ClusterError, Dashboard, JobError, dashboard_at, known_cause

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "http://", "http://head:99999999", "http://he ad", "ftp://head"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(JobError, match="write it as http://HEAD:8265, where Ray's dashboard listens"):
        dashboard_at(address)


def test_the_address_comes_from_the_option_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(JobError, match="which cluster"):
        dashboard_at(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the control service: no use here
    with pytest.raises(JobError, match="which cluster"):
        dashboard_at(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert dashboard_at(None).address == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://other")
    assert dashboard_at(None).address == "https://other"
    assert dashboard_at("third:8265").address == "http://third:8265"


def test_the_token_is_found_where_ray_looks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with scripted({}) as server:

        def sent() -> str | None:
            dashboard_at(server.address).check()
            return server.headers.get("Authorization")

        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert sent() is None
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("of-home\n", "utf-8")
        assert sent() == "Bearer of-home"
        (tmp_path / "token").write_text("of-file", "utf-8")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        assert sent() == "Bearer of-file"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "of-environment")
        assert sent() == "Bearer of-environment"
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
        with pytest.raises(JobError, match=r"RAY_AUTH_TOKEN_PATH=.*nowhere: No such file"):
            sent()


REFUSALS = {
    "another server": (404, "not found", JobError, "is not a Ray dashboard (it answers 404)"),
    "a web page": (200, "<html>", JobError, "is not a Ray dashboard (its answer begins with '<html>')"),
    "another API": (200, {}, JobError, "is not a Ray dashboard (its /api/version names no ray_version)"),
    "a redirection": (301, "", JobError, "is not a Ray dashboard (it answers 301)"),
    "no token": (401, "Unauthorized", JobError, "the cluster wants a token: set RAY_AUTH_TOKEN"),
    "a wrong token": (403, "Forbidden", JobError, "the cluster does not take this token; see RAY_AUTH_TOKEN"),
    "an old Ray": (200, {"ray_version": "2.9.3"}, JobError, f"the cluster runs Ray 2.9.3, and this code needs {RAY}"),
    "Ray behind a gateway, not yet up": (503, "", ClusterError, "answers 503: Ray is not up behind it"),
    "a failure": (
        500,
        "Traceback\nOSError: [Errno 5] I/O error\n",
        ClusterError,
        "answers 500: OSError: [Errno 5] I/O",
    ),
    "a full disk": (
        500,
        "OSError: [Errno 28] No space left on device",
        ClusterError,
        "answers 500: a disk of the cluster is full",
    ),
    "nobody home": (*CUT, ClusterError, "the connection was lost (Remote end closed connection without response)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_whoever_answers_the_cause_is_named(case: str) -> None:
    status, said, kind, told = REFUSALS[case]
    with scripted({"GET /api/version": [(status, said)]}) as server:
        with pytest.raises(kind) as refused:
            Dashboard(server.address).check()
        assert str(refused.value).startswith(f"{server.address}: {told}") and "\n" not in str(refused.value)


def test_jobs_that_are_no_list_are_not_rays() -> None:
    with scripted({"GET /api/jobs/": [(200, {"jobs": []})]}) as server, pytest.raises(JobError, match="is no list"):
        Dashboard(server.address).jobs()


def test_a_port_where_nothing_listens_and_a_host_that_is_none() -> None:
    with pytest.raises(ClusterError, match="nothing listens there"):
        Dashboard(f"http://127.0.0.1:{free_port()}").check()
    with pytest.raises(ClusterError, match=r"no host 'no-such-host.invalid' is known here"):
        Dashboard("http://no-such-host.invalid:8265").check()
    with scripted({}) as server, pytest.raises(JobError, match="TLS failed"):
        Dashboard(server.address.replace("http", "https")).check()


def test_a_port_where_something_else_speaks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00@\x00")  # gRPC's first words

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(
            JobError, match="it does not answer in HTTP; Ray's other ports, 6379 and 10001, take no jobs"
        ):
            Dashboard(f"http://127.0.0.1:{listening.getsockname()[1]}").check()
        thread.join()


def test_a_silent_port_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.dashboard.TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(ClusterError, match="no answer within"):
        Dashboard(f"http://127.0.0.1:{listening.getsockname()[1]}").check()


def test_the_version_is_the_one_that_pyproject_pins() -> None:
    assert f'"ray[default]>={RAY},<' in (ROOT / "pyproject.toml").read_text("utf-8")


CAUSES = {
    "error: reward: ModuleNotFoundError: No module named 'trl.models'; see w.log": "lacks the Python package trl.mod",
    "sh: 1: python: not found": "the cluster's image has no python on its PATH",
    "bash: line 1: python3: command not found": "the cluster's image has no python3 on its PATH",
    "ImportError: cannot import name 'Self' from 'typing' (/opt/lib/python3.10/typing.py)": "image has Python 3.10",
    "OSError: [Errno 28] No space left on device: '/tmp/ray/x'": "a disk of the cluster is full",
    "RuntimeError: Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\n"
    "This process on node 10.0.0.1 was started with:\n    Ray: 2.59.0\n    Python: 3.11.2\n": (
        "it was started with Ray 2.60.0 and Python 3.12.1, the job found Ray 2.59.0 and Python 3.11.2"
    ),
}


@pytest.mark.parametrize("log", CAUSES)
def test_causes_are_named(log: str) -> None:
    assert CAUSES[log] in (known_cause(f"something before\n{log}") or "")
    assert known_cause(log + "\nstep" * 50) is None  # long ago, and survived
