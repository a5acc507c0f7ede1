"""Jobs without a cluster: started once, followed over a bad connection, tried again, and what the commands refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_dashboard import CUT, Scripted, scripted
from services_world import environment, run_command

from services import jobs
from services.app import free_port
from services.dashboard import ClusterError, Dashboard, Job, JobError
from services.packing import Package

JOB, LOGS = "GET /api/jobs/nano-000001", "GET /api/jobs/nano-000001/logs"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pauses."""
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)


def fields(status: str, number: int = 1, **more: Any) -> dict[str, Any]:
    """What Ray's dashboard says of a job."""
    metadata = {"chatforge_run": "nano", "chatforge_recipe": "nano.yaml"}
    return {"submission_id": f"nano-{number:06d}", "status": status, "metadata": metadata, "start_time": number, **more}


def failed(code: int | None, log: str) -> dict[str, Any]:
    return fields("FAILED", driver_exit_code=code, message=f"Job entrypoint command failed, last logs:\n{log}")


# ---- following


def followed(server: Scripted) -> tuple[Job, str, list[str]]:
    shown: list[str] = []
    said: list[str] = []
    job = jobs.follow(Dashboard(server.address), "nano-000001", shown.append, said.append)
    return job, "".join(shown), said


@pytest.mark.usefixtures("at_once")
def test_a_log_is_shown_once_whatever_happens_to_the_connection() -> None:
    """Cut while the job is asked for and while the log is, refused, failing, and the log shorter than it was."""
    states = [(200, fields("PENDING")), CUT, (503, ""), *[(200, fields("RUNNING"))] * 5, (200, fields("SUCCEEDED"))]
    texts = [(500, "no agent yet"), (200, "one\ntw"), CUT, CUT, (200, "one\ntwo\nth"), (200, "one\n"), (500, "")]
    logs = [(status, {"logs": text} if status == 200 else text) for status, text in texts]
    with scripted({JOB: states, LOGS: [*logs, (200, {"logs": "one\ntwo\nthree\n"})]}) as server:
        job, shown, said = followed(server)
    assert (job.status, shown) == ("SUCCEEDED", "one\ntwo\nthree\n")
    lost, back = "trying again", "connected again"
    assert [lost if lost in line else back for line in said] == [lost, back, lost, back]


@pytest.mark.usefixtures("at_once")
def test_a_head_that_forgot_the_job_is_a_failure() -> None:
    gone = (404, "Job nano-000001 does not exist")
    with scripted({JOB: [(200, fields("RUNNING")), gone], LOGS: [(200, {"logs": "half a li"})]}) as server:
        job, shown, _ = followed(server)
    assert shown == "half a li" and jobs.exit_code(job) == 1 and jobs.may_retry(job)
    assert jobs.describe(job) == "job nano-000001 failed: the cluster does not know it; was its head restarted?"


@pytest.mark.usefixtures("at_once")
def test_a_log_that_went_with_its_node_is_said() -> None:
    with scripted({JOB: [(200, fields("FAILED"))], LOGS: [(500, "Cannot connect to host")]}) as server:
        _, shown, said = followed(server)
    assert shown == "" and "the end of its log cannot be read" in said[0]


@pytest.mark.usefixtures("at_once")
def test_a_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE", 0.1)
    said: list[str] = []
    with pytest.raises(ClusterError, match="nothing listens there"):
        jobs.follow(Dashboard(f"http://127.0.0.1:{free_port()}"), "nano-000001", said.append, said.append)
    assert len(said) == 1 and said[0].endswith("; trying again")


# ---- starting


SUBMISSION = jobs.Submission(
    "nano",
    "nano.yaml",
    "python -m services.cli train nano.yaml --run nano",
    Package(b"zip", 3, 2048),
    {"KEY": "secret"},
)
PACKAGE = f"/api/packages/{SUBMISSION.package.uri.replace('://', '/')}"


def started(server: Scripted) -> tuple[str, list[str]]:
    said: list[str] = []
    return jobs.start(Dashboard(server.address), SUBMISSION, said.append), said


def test_a_new_job_gets_the_code_the_environment_and_the_next_number() -> None:
    old = [fields("FAILED", 2), fields("STOPPED", 1), {"submission_id": "nano-other", "status": "RUNNING"}]
    answers = {f"GET {PACKAGE}": [(404, "")], "POST /api/jobs/": [(200, {})]}
    with scripted({"GET /api/jobs/": [(200, [*old, {"submission_id": None}])], **answers}) as server:
        job_id, said = started(server)
        assert server.asked[f"PUT {PACKAGE}"] == b"zip"
        body = json.loads(server.asked["POST /api/jobs/"])
    assert said == ["job nano-000003: 3 files, 2.0 KiB (3 B to send)"]
    assert body == {
        "submission_id": job_id,
        "entrypoint": SUBMISSION.entrypoint,
        "runtime_env": {
            "working_dir": SUBMISSION.package.uri,
            "env_vars": {"KEY": "secret", "RAY_JOB_STOP_WAIT_TIME_S": "600"},
        },
        "metadata": {"chatforge_run": "nano", "chatforge_recipe": "nano.yaml"},
    }
    assert "secret" not in repr(SUBMISSION)


def test_what_the_cluster_has_is_not_sent_again() -> None:
    with scripted({"POST /api/jobs/": [(200, {})], "GET /api/jobs/": [(200, [])]}) as server:
        _, said = started(server)
        assert f"PUT {PACKAGE}" not in server.asked
    assert said == ["job nano-000001: 3 files, 2.0 KiB (3 B to send), which the cluster has already"]


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_run_is_not_started_twice(status: str) -> None:
    with scripted({"GET /api/jobs/": [(200, [fields(status, 7), fields("FAILED", 8)])]}) as server:
        assert started(server) == (
            "nano-000007",
            [f"run nano: job nano-000007 is {status} already; nothing is submitted"],
        )
        assert "POST /api/jobs/" not in server.asked


def test_of_two_at_the_same_time_one_follows_the_other() -> None:
    """Ray takes an id once: who comes second hears so, looks again and finds the first one's job."""
    taken = (
        500,
        "ValueError: Job with submission_id nano-000001 already exists. Please use a different submission_id.",
    )
    listed = [(200, []), (200, [fields("PENDING")])]
    with scripted({"GET /api/jobs/": listed, "POST /api/jobs/": [taken]}) as server:
        assert started(server)[0] == "nano-000001"


def test_an_upload_that_is_refused_names_the_cause() -> None:
    for status, said, told in (
        (
            500,
            "Traceback ...\nOSError: [Errno 28] No space left on device\n",
            "answers 500: a disk of the cluster is full",
        ),
        (413, "Request Entity Too Large", "what lies between takes no such upload"),
    ):
        answers = {"GET /api/jobs/": [(200, [])], f"GET {PACKAGE}": [(404, "")], f"PUT {PACKAGE}": [(status, said)]}
        with scripted(answers) as server, pytest.raises(ClusterError, match=told):
            started(server)


RETRIES = {
    "a driver that was killed": (failed(-9, "half a line"), 137),
    "a crash": (failed(1, "error: pretrain failed after 3 restarts"), 1),
    "a head that forgot": (None, 1),
    "a user's mistake": (failed(2, "error: a.txt: matches no file"), 2),
    "an image that lacks something": (failed(1, "ModuleNotFoundError: No module named 'trl'"), 1),
    "a stop": (fields("STOPPED"), 143),
}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("case", RETRIES)
def test_what_may_not_happen_again_is_tried_again(case: str) -> None:
    end, code = RETRIES[case]
    first = [(404, "Job nano-000001 does not exist")] if end is None else [(200, end)]
    answers = {JOB: first, "GET /api/jobs/": [(200, [end or fields("FAILED")])]}
    answers |= {"POST /api/jobs/": [(200, {})], "GET /api/jobs/nano-000002": [(200, fields("SUCCEEDED", 2))]}
    said: list[str] = []
    with scripted(answers) as server:
        job = jobs.run_to_end(Dashboard(server.address), SUBMISSION, "nano-000001", 1, said.append, said.append)
    again = case in ("a driver that was killed", "a crash", "a head that forgot")
    assert (job.id, jobs.exit_code(job)) == (("nano-000002", 0) if again else ("nano-000001", code))
    assert any("; retry 1 of 1 in 5 s" in line for line in said) == again


# ---- what is said of a job


def test_how_a_job_ended_is_one_line() -> None:
    def described(**more: Any) -> str:
        return jobs.describe(Job("nano-000001", **more))

    assert described(status="RUNNING") == "job nano-000001 is RUNNING"
    assert described(status="SUCCEEDED") == "job nano-000001 is done"
    assert described(status="STOPPED") == "job nano-000001 was stopped"
    failure = described(
        status="FAILED", exit_code=2, message="failed, last logs:\nstarts\nerror: a.txt: no such file\n"
    )
    assert failure == "job nano-000001 failed with exit code 2: a.txt: no such file"
    killed = described(status="FAILED", exit_code=-9, message="failed, last logs:\npretrain 20/60\n")
    assert killed == "job nano-000001 failed: its driver was killed by signal 9"
    unborn = described(status="FAILED", message="runtime_env setup failed: ...\nOSError: [Errno 28] No space left\n")
    assert unborn == "job nano-000001 failed: OSError: [Errno 28] No space left"


def test_a_job_is_found_by_its_id_or_as_its_runs_newest() -> None:
    listed = [fields("FAILED", 1), fields("RUNNING", 2), {"submission_id": "raysubmit_x", "status": "SUCCEEDED"}]
    with scripted({"GET /api/jobs/": [(200, listed)]}) as server:
        dashboard = Dashboard(server.address)
        assert jobs.find(dashboard, "nano").id == "nano-000002"
        assert jobs.find(dashboard, "nano-000001").status == "FAILED"
        assert jobs.find(dashboard, "raysubmit_x").run == ""
        with pytest.raises(JobError, match=r"no job and no run 'nan' at http://.*: did you mean 'nano'"):
            jobs.find(dashboard, "nan")
        with pytest.raises(JobError, match="`chatforge jobs` lists what there is"):
            jobs.find(dashboard, "another")


def test_what_is_over_cannot_be_stopped() -> None:
    with scripted({}) as server:
        said = jobs.stop(Dashboard(server.address), Job("nano-000001", "SUCCEEDED"), print, print)
        assert said == "job nano-000001 is done; there is nothing to stop" and server.asked == {}


# ---- the commands


SUBMIT = ["submit", "tiny", "--address", "127.0.0.1:1"]
MISTAKES = {
    "nowhere to live": ([*SUBMIT], 2, "--runs is not given: name a folder that every node of the cluster has"),
    "a relative folder": ([*SUBMIT, "--runs", "runs"], 2, "--runs runs: name a folder that every node of the cluster"),
    "no such stage": ([*SUBMIT, "--stage", "sf"], 2, "stage 'sf' is not in recipe 'tiny', which has: tokenizer"),
    "numbers that do not fit": (
        [*SUBMIT, "--workers", "3"], 2, "pretrain: batch_size=8 is not divisible by workers",
    ),
    "a name for no job": ([*SUBMIT, "--run", "my run"], 2, "name='my run': a job's name is made of it"),
    "a secret that is not set": (
        [*SUBMIT, "--runs", "/r", "--set", "env=[CHATFORGE_NO_SUCH_KEY]"], 2, "env: CHATFORGE_NO_SUCH_KEY: not set",
    ),
    "retries of nobody": ([*SUBMIT, "--retries", "1", "--detach"], 2, "--retries: needs the command to wait"),
    "large data": (
        [*SUBMIT, "--runs", "/r", "--set", "pretrain.text=[huge.txt]"], 2, "the upload would be 10.0 GiB, over the ",
    ),
    "no cluster": (["jobs"], 2, "which cluster? give --address http://HEAD:8265"),
    "nothing there": ([*SUBMIT, "--runs", "/r"], 1, "http://127.0.0.1:1: nothing listens there; see --address"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_prints_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment():
        if name.startswith("RAY_") or name == "CHATFORGE_RUNS":
            monkeypatch.delenv(name)
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(10 << 30)
    arguments, code, said = MISTAKES[case]
    told = run_command(arguments, tmp_path)
    assert (told.returncode, told.stdout) == (code, "")
    assert said in told.stderr and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1


def test_a_machine_without_ray_and_torch_can_submit(tmp_path: Path) -> None:
    code = "import sys\nsys.modules |= dict.fromkeys(('ray', 'torch', 'transformers', 'datasets'))\n"
    code += "from services.cli import app\napp(sys.argv[1:])"
    with scripted({"GET /api/jobs/": [(200, [])], "POST /api/jobs/": [(200, {})]}) as server:
        arguments = ["submit", "gpt2-124m", "--runs", "/shared/runs", "--detach", "--address", server.address]
        command = [sys.executable, "-c", code, *arguments]
        told = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert told.stdout == "gpt2-124m-000001\n", told.stderr


def test_secrets_go_along_and_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATFORGE_TEST_KEY", "a-secret-value")
    uploads = {"GET /api/jobs/": [(200, [])], "POST /api/jobs/": [(200, {})]}
    with scripted(uploads) as server:
        arguments = ["submit", "tiny", "--runs", "s3://bucket/runs", "--set", "env=[CHATFORGE_TEST_KEY]", "--detach"]
        told = run_command([*arguments, "--address", server.address], tmp_path)
        sent = json.loads(server.asked["POST /api/jobs/"])["runtime_env"]["env_vars"]
    assert told.returncode == 0 and told.stdout == "tiny-000001\n"
    assert sent["CHATFORGE_TEST_KEY"] == "a-secret-value" and sent["CHATFORGE_RUNS"] == "s3://bucket/runs"
    assert "a-secret-value" not in told.stdout + told.stderr
