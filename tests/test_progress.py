import threading
import time

import pytest

from training import progress
from training.run import Run, write_atomic


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "r", "pretrain")
    run.folder.mkdir(parents=True)
    return run


def follow(run, monkeypatch, steps):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with progress.Progress(run, threading.Event()):
        for step in steps:
            run.log(step, 10, loss=1.0 / step, tokens_per_second=4321.0)
            time.sleep(0.12)


def test_a_log_gets_plain_lines_with_rate_and_time_left(run, monkeypatch, capsys):
    follow(run, monkeypatch, (1, 2, 3))
    lines = capsys.readouterr().out.splitlines()
    assert any("pretrain  2/10" in line and "left" in line and "tok/s 4,321" in line for line in lines)
    assert lines[-1].startswith(" pretrain  3/10") and "loss 0.3333" in lines[-1]


def test_what_an_earlier_attempt_logged_is_not_shown_as_progress(run, monkeypatch, capsys):
    write_atomic(run.folder / "metrics.jsonl", '{"step": 7, "total": 10, "time": 1.0, "loss": 5.0}\n')
    follow(run, monkeypatch, (8,))
    assert "7/10" not in capsys.readouterr().out


def test_a_stage_that_logs_nothing_says_nothing(run, monkeypatch, capsys):
    follow(run, monkeypatch, ())
    assert capsys.readouterr().out == ""


def test_more_than_an_hour_left_is_said_in_hours(run, monkeypatch, capsys):
    lines = [{"step": step, "total": 5001, "time": time.time() + 10 + step, "loss": 1.0} for step in (1, 2)]
    monkeypatch.setattr(Run, "metrics", lambda self: lines)
    follow(run, monkeypatch, ())
    assert "2/5001  1:23:19 left" in capsys.readouterr().out
