"""The run folder: whatever instant a kill comes at, the last good state is there."""

import json

import pytest

from training.run import Run, file_atomic, folder_atomic, read_jsonl, save_model, write_atomic


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "runs" / "r", "pretrain")
    run.folder.mkdir(parents=True)
    return run


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    with folder_atomic(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError), folder_atomic(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
        raise OSError("disk full")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    for content, name in (("old", "a"), ("new", "b")):
        with folder_atomic(tmp_path / "model") as folder:
            (folder / name).write_text(content)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_whole(tmp_path):
    write_atomic(tmp_path / "deep" / "run.json", "1")
    write_atomic(tmp_path / "deep" / "run.json", "2")
    assert (tmp_path / "deep" / "run.json").read_text() == "2"
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "sheet.png", "old")
    with pytest.raises(OSError), file_atomic(tmp_path / "sheet.png") as temporary:
        temporary.write_text("new")
        raise OSError("disk full")
    assert (tmp_path / "sheet.png").read_text() == "old"


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_rewind_forgets_the_steps_that_will_be_taken_again(run):
    for step in range(1, 6):
        run.log(step, 5, loss=1.0 / step)
    run.rewind(3)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]


def test_final_metrics_are_the_last_of_each(run):
    run.log(1, 2, loss=2.0, val_loss=3.0)
    run.log(2, 2, loss=1.0)
    assert run.final_metrics() == {"loss": 1.0, "val_loss": 3.0}


def test_only_rank_0_writes_metrics(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run.log(1, 1, loss=1.0)
    assert run.metrics() == []


def test_the_newest_complete_checkpoint_is_found(run):
    for name in ("step-00000009", "step-00000010", "step-00000011.tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.latest_checkpoint() == (10, run.checkpoints / "step-00000010")


def test_a_model_folder_says_what_it_is(run):
    save_model(run, lambda folder: (folder / "config.json").write_text("{}"), "reward", accuracy=0.7)
    card = json.loads((run.model / "chatforge.json").read_text())
    assert card == {"kind": "reward", "run": "r", "stage": "pretrain", "accuracy": 0.7}


def test_notes_are_kept_once_and_by_the_first_worker(tmp_path, monkeypatch):
    run = Run(tmp_path / "r", "sft")
    run.folder.mkdir(parents=True)
    run.note("3 of 9 chats fit")
    run.note("3 of 9 chats fit")
    run.note("two\nlines")
    monkeypatch.setenv("RANK", "1")
    run.note("the others' words")
    assert run.notes() == ["3 of 9 chats fit", "two lines"]
