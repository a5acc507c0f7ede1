"""Runs whose folder is a URI: seen from another machine, gone on with there, and on workers with disks of their own."""

import json
import shutil
import signal
import threading

import pytest
from conftest import losses
from s3 import files, fill
from services_world import run_command
from workers import two_processes

from training import mirror, pipeline, pretrain, zero
from training.config import PretrainConfig
from training.picture_stage import cached, fetched
from training.progress import Progress
from training.recipe import Recipe
from training.run import Run, StageError, save_model
from training.runs import list_runs, run_folder
from training.store import Store, StoreError, open_store

SIZES = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "seq_len": 32}
SHARED = {"batch_size": 8, "micro_batch_size": 4, "dtype": "fp32", "learning_rate": 3e-3}


@pytest.fixture
def uri(bucket):
    return f"{bucket}/runs"


def recipe(tiny_world, **changes):
    text = [str(tiny_world.corpus)]
    return Recipe.model_validate(
        {"name": "r", "tokenizer": {"text": text}, "pretrain": {"text": text, "tokens": 100_000} | changes}
    )


def finish(r, runs, stage):
    """Leave what a stage that ran to its end leaves."""
    root, uri = mirror.locate(runs, r.name)
    run = pipeline.stage_run(r, root, stage, store=uri)
    mirror.write_file(root, uri, "run.json", r.model_dump_json())
    save_model(run, lambda folder: (folder / "model.safetensors").write_text(stage), "causal-lm")
    if uri:
        mirror.push_results(run)
    pipeline._write_manifest(run, pipeline._identity(r, root, stage), 1.0)
    return run


def states(r, runs):
    return [planned.state for planned in pipeline.plan(r, runs)]


def test_another_machine_sees_what_is_done(uri, tmp_path, tiny_world, monkeypatch):
    r = recipe(tiny_world)
    for stage in r.stages:
        finish(r, uri, stage)
    monkeypatch.setenv("CHATFORGE_CACHE", str(tmp_path / "another"))
    assert states(r, uri) == ["done", "done"]
    assert states(recipe(tiny_world, learning_rate=1e-5), uri) == ["done", "stale"]
    assert [run["name"] for run in list_runs(uri)] == ["r"]
    told = run_command(["runs", "r", "--runs", uri], tmp_path)
    assert told.returncode == 0 and "pretrain" in told.stdout and told.stderr == ""


def test_a_model_has_the_same_hash_in_a_store_and_in_a_folder(uri, tmp_path, tiny_world):
    r = recipe(tiny_world)
    ends = [finish(r, runs, "pretrain").folder / "manifest.json" for runs in (uri, tmp_path)]
    assert len({json.loads(end.read_text())["output"] for end in ends}) == 1


def test_a_folder_of_the_same_name_stays_as_it_is(uri, tmp_path, tiny_world, monkeypatch):
    """The disk's copy of a URI's run is no run of this disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHATFORGE_CACHE")
    r = recipe(tiny_world)
    finish(r, "runs", "pretrain")
    before = files(tmp_path / "runs" / "r")
    assert states(r, uri) == ["new", "new"]
    finish(r, uri, "tokenizer")
    assert files(tmp_path / "runs" / "r") == before
    assert [run["name"] for run in list_runs("runs")] == ["r"]


def test_who_looks_at_a_run_takes_nothing_from_it(uri, tiny_world):
    """On the machine that trains it: what had not been sent yet was replaced by what the store had."""
    r = recipe(tiny_world)
    root, store = mirror.locate(uri, r.name)
    mirror.write_file(root, store, "run.json", r.model_dump_json())
    run = pipeline.stage_run(r, root, "pretrain", store=store)
    run.folder.mkdir(parents=True)
    run.log(1, 2, loss=3.0)
    mirror.push_files(run)
    run.log(2, 2, loss=2.0)
    (run.folder / "samples").mkdir()
    (run.folder / "samples" / "step-00000001.png").write_bytes(b"a picture")
    mirror.push_results(run)
    seen = run_folder(uri, r.name, samples=True)
    assert seen != root and (seen / "pretrain" / "samples" / "step-00000001.png").read_bytes() == b"a picture"
    assert [line["step"] for line in Run(seen, "pretrain").metrics()] == [1]
    pipeline.plan(r, uri)
    assert losses(run) == [3.0, 2.0]


@pytest.mark.parametrize("name", ["/models/mine", "../mine", "runs/mine", ".."])
def test_a_path_is_no_run_of_a_store(uri, name):
    """What the store has not is deleted here: of a path, that would be the user's own files."""
    with pytest.raises(StoreError, match="is no run's name"):
        run_folder(uri, name)


def test_a_log_that_cannot_be_sent_hides_nothing(uri, tmp_path, tiny_world, monkeypatch, capsys):
    """The store goes away as a stage fails: it is the stage's own failure that is told."""
    r = recipe(tiny_world)
    root, store = mirror.locate(uri, r.name)
    run = pipeline.stage_run(r, root, "pretrain", store=store)
    run.folder.mkdir(parents=True)
    (run.folder / "worker-0.log").write_text("words")

    def away(*_):
        raise StoreError("away")

    with pytest.raises(StageError, match="lower learning_rate"), zero.mirrored(r.pretrain, run):
        monkeypatch.setattr(Store, "write", away)
        run.log(1, 2, loss=float("nan"))
        raise StageError("lower learning_rate")
    assert capsys.readouterr().out.count("away") >= 2


def test_a_stage_is_forgotten_whole(uri, tiny_world):
    run = finish(recipe(tiny_world), uri, "pretrain")
    mirror.forget_stage(run)
    assert list(open_store(run.store).objects()) == ["run.json"] and not run.folder.exists()


def test_the_driver_forgets_what_the_store_has_not(uri, tiny_world):
    r = recipe(tiny_world)
    run = finish(r, uri, "pretrain")
    open_store(run.store).delete("pretrain/manifest.json")
    assert states(r, uri) == ["new", "new"]
    mirror.pull_files(run.root, run.store)  # as a training begins
    assert not (run.folder / "manifest.json").exists()


def test_the_newest_checkpoint_goes_along_with_what_it_needs(uri, tmp_path):
    run, other = (run_on(tmp_path / name, uri) for name in "AB")
    run.folder.mkdir(parents=True)
    for step in (10, 20):
        write = json.dumps({"step": step, "total": 30, "loss": 1.0})
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(write + "\n")
        fill(run.checkpoints / "averages", {f"step-{step:08d}": "weights"})
        written = fill(run.checkpoints / "writing.tmp", {"state": str(step)})
        mirror.commit_checkpoint(run, step, mirror.upload_checkpoint(run, step, written))
    fill(other.folder / "shards", {"old": "of another life"})
    fill(other.checkpoint_path(10), {"state": "10"})
    mirror.pull_stage(other, ())
    assert mirror.newest_step(other) == other.latest_checkpoint()[0] == 20
    names = {"metrics.jsonl", "checkpoints/averages/step-00000020", "checkpoints/step-00000020/state"}
    assert set(files(other.folder)) == names
    assert open_store(run.store).folders("pretrain/checkpoints") == ("averages", "step-00000020")


def test_half_a_checkpoint_is_not_gone_on_from(uri, tmp_path):
    run, other = (run_on(tmp_path / name, uri) for name in "AB")
    for step, is_whole in ((10, True), (20, False)):
        index = mirror.upload_checkpoint(run, step, fill(run.folder / "trainer", {"state": str(step)}))
        if is_whole:
            mirror.commit_checkpoint(run, step, index)
    mirror.pull_stage(other, ())
    assert other.latest_checkpoint()[0] == 10


def test_progress_is_followed_from_another_disk(uri, tmp_path):
    run, other = (run_on(tmp_path / name, uri) for name in "AB")
    progress = Progress(other, threading.Event())
    run.folder.mkdir(parents=True)
    run.log(3, 10, loss=1.5)
    mirror.push_files(run)
    assert progress._latest()["step"] == 3


def test_what_runs_share_is_made_once(uri, tmp_path):
    one, two = (run_on(tmp_path / name, uri) for name in "AB")
    made, wanted = (run.root.parent / ".cache" / "latents" / "123" for run in (one, two))
    mirror.push_shared(one, fill(made, {"latents.npy": "1"}))
    assert mirror.pull_shared(two, wanted) and files(wanted) == files(made)
    assert not mirror.pull_shared(two, wanted.with_name("456"))


def test_what_could_not_be_sent_is_sent_by_whoever_needs_it_next(uri, tmp_path, monkeypatch):
    """It lay on the first worker's disk alone, and the others asked the store for it in vain."""
    one, two = (run_on(tmp_path / name, uri) for name in "AB")

    def away(run, folder):
        raise StoreError("away")

    def write(folder):
        (folder / "latents.npy").write_text("1")

    with monkeypatch.context() as patch, pytest.raises(StoreError):
        patch.setattr(mirror, "push_shared", away)
        cached(one, "latents", ["a"], write)
    name = cached(one, "latents", ["a"], write)
    assert files(fetched(two, name)) == files(one.root.parent / name)


# ---- training


def run_on(disk, uri):
    return Run(disk / "r", "pretrain", seed=3, val_fraction=0.1, store=f"{uri}/r")


def train(config, run):
    zero.init_distributed("cpu")
    with zero.mirrored(config, run) as settings:
        pretrain.run(settings, run)


@pytest.fixture(scope="module")
def config(tiny_world):
    return PretrainConfig(text=[str(tiny_world.corpus)], tokens=32 * 8 * 12, checkpoint_every=4, **SIZES, **SHARED)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_world, config):
    """A run that has no store."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), "pretrain", seed=3, val_fraction=0.1)
    run.folder.mkdir()
    run.of("tokenizer").folder.mkdir()
    run.of("tokenizer").model.symlink_to(tiny_world.tokenizer)
    train(config, run)
    return run


@pytest.fixture
def with_tokenizer(uri, tiny_world):
    open_store(uri).push(tiny_world.tokenizer, "r/tokenizer/model")
    return uri


def test_a_run_goes_on_from_an_empty_disk(with_tokenizer, tmp_path, config, undisturbed, monkeypatch):
    first, second = (run_on(tmp_path / name, with_tokenizer) for name in "AB")
    log = Run.log

    def die(self, step, total, **metrics):
        log(self, step, total, **metrics)
        if step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", die)
        train(config, first)
    shutil.rmtree(first.root)
    assert mirror.newest_step(second) == 4
    train(config, second)
    assert losses(second) == losses(undisturbed)
    there = open_store(second.store)
    assert there.read("pretrain/metrics.jsonl") == (second.folder / "metrics.jsonl").read_bytes()
    there.pull("pretrain/model", tmp_path / "model")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "model", undisturbed.model)]
    assert weights[0] == weights[1]


NODE = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from training import pretrain, zero
from training.config import PretrainConfig
from training.run import Run
disk, uri, config, dies_at = Path(sys.argv[1], os.environ["RANK"]), *sys.argv[2:]
log = Run.log
def die(self, step, total, **metrics):
    log(self, step, total, **metrics)
    if step == int(dies_at):
        if self.root.name == "zero3":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
Run.log = die
for zero_stage in (1, 3):
    name = f"zero{zero_stage}"
    run = Run(disk / name, "pretrain", seed=3, workers=2, val_fraction=0.1, store=f"{uri}/{name}")
    with suppress(KeyboardInterrupt):
        chosen = PretrainConfig.model_validate_json(config).model_copy(update={"zero_stage": zero_stage})
        with zero.mirrored(chosen, run) as settings:
            pretrain.run(settings, run)
"""


def test_two_nodes_go_on_from_what_each_has_sent(uri, tmp_path, config, undisturbed, tiny_world):
    there, names, settings = open_store(uri), ("zero1", "zero3"), config.model_dump_json()
    for name in names:
        there.push(tiny_world.tokenizer, f"{name}/tokenizer/model")
    codes, told = two_processes(NODE, [str(tmp_path / "first"), uri, settings, "10"])
    assert codes == [-signal.SIGKILL] * 2, told
    for name in names:
        mine = [set(files(tmp_path / "first" / rank / name / "pretrain" / "checkpoints")) for rank in "01"]
        whole = {f"step-00000008/{path}" for path in there.index(f"{name}/pretrain/checkpoints/step-00000008")}
        assert mine[0] | mine[1] == whole and not mine[0] & mine[1] and mine[1]
    codes, told = two_processes(NODE, [str(tmp_path / "second"), uri, settings, "0"])
    assert codes == [0, 0], told
    for name in names:
        both = Run(tmp_path / "second" / "0" / name, "pretrain")
        assert losses(both) == pytest.approx(losses(undisturbed), abs=1e-4)
        assert not (tmp_path / "second" / "1" / name / "pretrain" / "model").exists()
