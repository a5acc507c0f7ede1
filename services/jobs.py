"""A training run as a Ray job: started once, followed to its end whatever becomes of the connection, stopped cleanly.

A job's id is its run's name and a number, NANO-000003: of two who submit at the same time, the cluster takes one. What
a run has done is in its run folder, so every job of it goes on where the one before came to.
"""

import difflib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from services.dashboard import RECIPE, RUN, ClusterError, Dashboard, Job, JobError, known_cause, last_line
from services.packing import Package

STOP_WAIT = 600  # seconds that a job has to write its checkpoint before Ray kills it
USER_ERROR, STOPPED = 2, 143  # exit codes
GOES_ON = "submitted again, the run goes on"

_POLL = 1.0  # seconds between two looks at a job
_LOG_RATE = 1 << 20  # bytes per second of log that are asked for at the most: Ray sends a log whole
_PATIENCE = 600.0  # seconds without the cluster after which a follower gives up
_LONGEST_PAUSE = 15.0  # seconds between two tries to reach it
_RETRY_PAUSE = 5.0  # seconds before a job that died is submitted again: its workers end in them

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Submission:
    """All that it takes to start a job of a run, any number of times."""

    run: str
    recipe: str  # as the user named it
    entrypoint: str
    package: Package = field(repr=False)
    env_vars: Mapping[str, str] = field(repr=False)  # secrets among them


def run_to_end(dashboard: Dashboard, submission: Submission, job_id: str, retries: int, show: Say, say: Say) -> Job:
    """Follows a job that was started, and starts it again up to `retries` times where that may help.

    `show` gets the job's log as it grows, `say` what there is to say of the job itself.
    """
    job = follow(dashboard, job_id, show, say)
    for retry in range(1, retries + 1):
        if not may_retry(job):
            break
        say(f"{describe(job)}; retry {retry} of {retries} in {_RETRY_PAUSE:.0f} s")
        time.sleep(_RETRY_PAUSE)
        job = follow(dashboard, patiently(lambda: start(dashboard, submission, say), say), show, say)
    return job


def start(dashboard: Dashboard, submission: Submission, say: Say) -> str:
    """The id of the run's job: a new one, or the one that already waits or runs."""
    run = submission.run
    while True:
        jobs = dashboard.jobs()
        if going := [job for job in jobs if job.run == run and not job.is_over]:
            say(f"run {run}: job {going[-1].id} is {going[-1].status} already; nothing is submitted")
            return going[-1].id
        package = submission.package
        sent = dashboard.upload(package.uri, package.data)
        job_id = f"{run}-{_number(run, jobs):06d}"
        runtime_env = {"working_dir": package.uri, "env_vars": _environment(submission)}
        if dashboard.submit(job_id, submission.entrypoint, runtime_env, {RUN: run, RECIPE: submission.recipe}):
            say(f"job {job_id}: {package}{'' if sent else ', which the cluster has already'}")
            return job_id


def _environment(submission: Submission) -> dict[str, str]:
    return {**submission.env_vars, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT)}


def _number(run: str, jobs: list[Job]) -> int:
    """One more than any job of this run has had."""
    found = (re.fullmatch(rf"{re.escape(run)}-(\d+)", job.id) for job in jobs)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def follow(dashboard: Dashboard, job_id: str, show: Say, say: Say, shown: int = 0) -> Job:
    """Shows a job's log from its character `shown` on until the job is over; every character once.

    A lost connection is taken up again; raises ClusterError where that fails for _PATIENCE seconds.
    """
    while True:
        # In this order: once the job is over, its log is whole.
        job = patiently(lambda: dashboard.job(job_id), say)
        if job is None:
            return Job(job_id, "FAILED", message="the cluster does not know it; was its head restarted?")
        log = patiently(lambda: dashboard.log(job_id), say)
        if log and len(log) > shown:
            show(log[shown:])
            shown = len(log)
        if job.is_over:
            if log and not log.endswith("\n"):
                show("\n")
            if log is None:
                say(f"job {job_id}: the end of its log cannot be read: the node that it ran on does not answer")
            return job
        time.sleep(max(_POLL, shown / _LOG_RATE))


def stop(dashboard: Dashboard, job: Job, show: Say, say: Say) -> str:
    """Has a job end at its next checkpoint, waits for it, and tells what happened."""
    if job.is_over:
        return f"{describe(job)}; there is nothing to stop"
    shown = len(dashboard.log(job.id) or "")
    began = time.monotonic()
    dashboard.stop(job.id)
    say(f"job {job.id} is asked to stop; it has {STOP_WAIT} s to write a checkpoint")
    ended = follow(dashboard, job.id, show, say, shown)
    took = time.monotonic() - began
    if ended.status == "STOPPED" and took > STOP_WAIT:
        return f"job {job.id} did not end within {STOP_WAIT} s and was killed; {GOES_ON} from its last checkpoint"
    return f"{describe(ended)} after {took:.0f} s{f'; {GOES_ON}' if goes_on(ended) else ''}"


def find(dashboard: Dashboard, name: str) -> Job:
    """The job of that id, else the newest job of the run of that name; raises JobError where there is neither."""
    jobs = dashboard.jobs()
    named = [job for job in jobs if job.id == name] or [job for job in jobs if job.run == name]
    if named:
        return named[-1]
    known = sorted({job.id for job in jobs} | {job.run for job in jobs if job.run})
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`chatforge jobs` lists what there is"
    raise JobError(f"no job and no run {name!r} at {dashboard.address}: {hint}")


def describe(job: Job) -> str:
    """How a job ended, or that it has not, in one line with the cause."""
    if not job.is_over:
        return f"job {job.id} is {job.status}"
    if job.status == "SUCCEEDED":
        return f"job {job.id} is done"
    if job.status == "STOPPED":
        return f"job {job.id} was stopped"
    code = exit_code(job)
    if job.exit_code is not None and code > 128:
        return f"job {job.id} failed: its driver was killed by signal {code - 128}"
    how = "failed" if job.exit_code is None else f"failed with exit code {code}"
    return f"job {job.id} {how}: {known_cause(job.message) or last_line(job.message).removeprefix('error: ')}"


def exit_code(job: Job) -> int:
    """What a shell would have seen, had the job run there."""
    if job.status != "FAILED":
        return STOPPED if job.status == "STOPPED" else 0
    if job.exit_code is None:
        return 1
    return job.exit_code if job.exit_code >= 0 else 128 - job.exit_code


def goes_on(job: Job) -> bool:
    """Whether it makes sense to submit a run again whose job ended so."""
    return job.status == "STOPPED" or may_retry(job)


def may_retry(job: Job) -> bool:
    """Whether a job failed in a way that may not happen again."""
    return job.status == "FAILED" and job.exit_code != USER_ERROR and known_cause(job.message) is None


def patiently(call: Callable[[], T], say: Say) -> T:
    """What `call` returns, tried again for _PATIENCE seconds where the cluster cannot be reached."""
    lost, pause = 0.0, 1.0
    while True:
        try:
            result = call()
        except ClusterError as error:
            lost = lost or time.monotonic()
            if error.code != "UNAVAILABLE" or time.monotonic() - lost > _PATIENCE:
                raise
            if pause == 1.0:
                say(f"{error}; trying again")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            if lost:
                say(f"connected again after {time.monotonic() - lost:.0f} s")
            return result
