"""A run on this disk and its twin in a store: what is copied between them, and when.

What the store has is what counts. Its layout is that of the run folder (run.py), each folder with an index (store.py);
this disk has a copy of it, which is made equal to the store before anything reads it:

    driver, before it plans and after a stage   gets the small files of the run: manifests, metrics, rankings
    one worker a node, before a stage           gets what its parents made, what it had prepared, its checkpoint
    rank 0, when it has prepared data           sends it, and the other nodes get it
    all workers, at a checkpoint                send their part; the index, and with it the checkpoint, comes last
    rank 0, meanwhile                           sends the small files, every FILES_EVERY seconds
    rank 0, at the end                          sends the model; every node its logs

Without torch. What all workers do together stands in zero.py.
"""

import fnmatch
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.copies import cache_folder, locked
from training.run import Run, parse_jsonl, write_atomic
from training.store import Index, Store, StoreError, is_uri, join, open_store

FILES_EVERY = 15.0  # seconds
DRIVERS = ("manifest.json", "started.json")  # files that no worker writes
GROWING = ("samples", "tensorboard")  # folders that a stage adds to as it goes
CHECKPOINTS = "checkpoints"
WRITTEN, SEEN = "runs", "seen"  # below the cache: runs that train here, and those that are looked at
SCRATCH = "trainer"  # where transformers writes what then becomes a checkpoint

_sending = threading.Lock()
_sent: dict[Path, tuple[int, int]] = {}  # file → its size and time when it was last sent
_same: dict[Path, int] = {}  # folder → its inode when it was last equal to the store's: a new version has a new one


def locate(runs: str | Path, name: str, kind: str = WRITTEN) -> tuple[Path, str | None]:
    """A run's folder on this disk, and its URI where `runs` is one.

    Of a URI's run there are two folders: what is WRITTEN while it trains, and what is SEEN by who looks at it
    meanwhile, who gets what the store has, and must not undo what has not been sent yet.
    """
    if not is_uri(str(runs)):
        return Path(runs) / name, None
    if Path(name).name != name or name == "..":
        raise StoreError(f"{runs}: {name!r} is no run's name, which is a single word")
    scheme, _, rest = str(runs).partition("?")[0].partition("://")
    return cache_folder().resolve() / kind / scheme / rest.strip("/") / name, join(str(runs), name)


def names(runs: str | Path) -> list[str]:
    """Of the runs that there are, in order."""
    if not is_uri(str(runs)):
        return sorted(path.parent.name for path in Path(runs).glob("*/run.json"))
    store = open_store(str(runs))
    return [name for name in store.folders() if store.exists(f"{name}/run.json")]


# ---- the driver


def pull_files(root: Path, uri: str | None) -> None:
    """Make the small files of a run, and of its stages, what the store has; nothing for a run without a store."""
    if uri is None:
        return
    store = open_store(uri)
    _pull_files(store, "", root)
    local = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    for stage in sorted(local | set(store.folders())):
        _pull_files(store, stage, root / stage)


def pull_samples(root: Path, uri: str | None) -> None:
    """The sheets of pictures, which a report shows; nothing for a run without a store."""
    if uri is None:
        return
    store = open_store(uri)
    for stage in store.folders():
        if "samples" in store.list(stage):
            store.pull(f"{stage}/samples", root / stage / "samples")
        else:  # those of a training before this one
            shutil.rmtree(root / stage / "samples", ignore_errors=True)


def write_file(root: Path, uri: str | None, name: str, text: str) -> None:
    """A small file of the run, here and in its store."""
    write_atomic(root / name, text)
    if uri:
        open_store(uri).write(name, text.encode())


def forget_stage(run: Run) -> None:
    """Delete all that a stage has left, first what says how far it had come."""
    if run.store:
        for name in (*DRIVERS, ""):
            open_store(run.store).delete(f"{run.stage}/{name}".rstrip("/"))
    shutil.rmtree(run.folder, ignore_errors=True)


def forget_checkpoints(run: Run) -> None:
    if run.store:
        open_store(run.store).delete(f"{run.stage}/{CHECKPOINTS}")
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def newest_step(run: Run) -> int | None:
    """Of the checkpoints that are whole."""
    if run.store is None:
        latest = run.latest_checkpoint()
        return latest[0] if latest else None
    return max(map(_step, _steps(open_store(run.store), run)), default=None)


def stored_metrics(run: Run) -> list[dict[str, Any]]:
    """What rank 0 has last sent of its metrics, from whichever node."""
    key = f"{run.stage}/metrics.jsonl"
    if run.store is None or not open_store(run.store).exists(key):
        return []
    return parse_jsonl(open_store(run.store).read(key).decode())


def model_index(run: Run) -> Index | None:
    """The files of the model that the store has; None where there is no store, or no model."""
    return open_store(run.store).index(f"{run.stage}/model") if run.store else None


# ---- a node


def pull_stage(run: Run, parents: Iterable[str]) -> None:
    """Make this disk's part of the stage, and what it reads of its parents, what the store has."""
    store = _store(run)
    _pull_files(store, "", run.root)
    for parent in parents:
        _pull_files(store, parent, run.root / parent)
        # An evaluation also reads what its parents had held out.
        names = store.list(parent) if run.stage == "evaluate" else {"model"} & set(store.list(parent))
        for name in sorted(names):
            store.pull(f"{parent}/{name}", run.root / parent / name)
    _pull_files(store, run.stage, run.folder)
    pull_prepared(run)
    steps, others = _steps(store, run), set(store.list(f"{run.stage}/{CHECKPOINTS}"))
    kept = {*steps[-1:], *others.difference(steps)}
    _only(run.checkpoints, kept)
    for name in sorted(kept):
        store.pull(f"{run.stage}/{CHECKPOINTS}/{name}", run.checkpoints / name)


def pull_prepared(run: Run) -> None:
    """The folders of the stage beside its checkpoints: data that rank 0 has prepared, samples, event files."""
    store = _store(run)
    names = set(store.list(run.stage)) - {"model"}
    _only(run.folder, names | {CHECKPOINTS})
    for name in sorted(names):
        store.pull(f"{run.stage}/{name}", run.folder / name)
        _same[run.folder / name] = (run.folder / name).stat().st_ino


@contextmanager
def sending_files(run: Run) -> Iterator[None]:
    """Inside, the stage's small files go to the store now and then, and once more at its end, however it ends."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(FILES_EVERY):
            try:
                push_files(run)
            except StoreError as error:  # those that count are sent again with the next checkpoint
                print(error, flush=True)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        over.set()
        sender.join()
        try:
            push_files(run)
        except StoreError as error:
            if not failed:
                raise
            print(error, flush=True)  # what has failed before is the news


def push_files(run: Run) -> None:
    """Metrics, rankings and the like, those that have changed."""
    with _sending:  # one after the other, else an old version could arrive last
        for path in _files(run):
            version = (path.stat().st_size, path.stat().st_mtime_ns)
            if _sent.get(path) != version and not _is_log(path.name):
                _store(run).write(f"{run.stage}/{path.name}", path.read_bytes())
                _sent[path] = version


def push_logs(run: Run) -> None:
    """What the workers of this disk have printed; a store that does not take it is no reason to fail."""
    try:
        for path in _files(run):
            if _is_log(path.name):
                _store(run).write(f"{run.stage}/{path.name}", path.read_bytes())
    except StoreError as error:
        print(error, flush=True)


# ---- rank 0, and every node's part of a checkpoint


def push_prepared(run: Run) -> None:
    """What the stage has in folders and the store has not."""
    for folder in _folders(run.folder):
        if folder.name not in (*GROWING, "model") and _same.get(folder) != folder.stat().st_ino:
            _store(run).push(folder, f"{run.stage}/{folder.name}")
            _same[folder] = folder.stat().st_ino


def push_results(run: Run) -> None:
    """The model, samples and event files."""
    for folder in _folders(run.folder):
        if folder.name in (*GROWING, "model"):
            _store(run).push(folder, f"{run.stage}/{folder.name}")


def upload_checkpoint(run: Run, step: int, written: Path) -> Index:
    """Send this disk's part of a checkpoint."""
    return _store(run).upload(written, _checkpoint(run, step))


def commit_checkpoint(run: Run, step: int, index: Index) -> None:
    """Make the checkpoint whose parts are in `index` the one to go on from, metrics and all."""
    store = _store(run)
    push_files(run)
    for folder in _folders(run.checkpoints):  # weights that are averaged in the end, say
        if not folder.name.startswith("step-"):
            store.push(folder, f"{run.stage}/{CHECKPOINTS}/{folder.name}")
    store.commit(_checkpoint(run, step), index)
    for name in store.folders(f"{run.stage}/{CHECKPOINTS}"):
        if name.startswith("step-") and name != run.checkpoint_path(step).name:
            store.delete(f"{run.stage}/{CHECKPOINTS}/{name}")


# ---- what every run beside this one shares


def pull_shared(run: Run, folder: Path) -> bool:
    """Whether a folder below the runs' own cache is here, or could be fetched."""
    if run.store and not folder.exists():
        store, key = _shared(run, folder)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists() and store.exists(key):
                store.pull(key, folder)
    return folder.exists()


def push_shared(run: Run, folder: Path) -> None:
    """Sends it where the store has none: its name says what is in it."""
    if run.store:
        store, key = _shared(run, folder)
        if not store.exists(key):
            store.push(folder, key)


def _shared(run: Run, folder: Path) -> tuple[Store, str]:
    assert run.store
    location, question, query = run.store.partition("?")
    runs = open_store(f"{location.rpartition('/')[0]}{question}{query}")
    return runs, folder.relative_to(run.root.parent).as_posix()


# ---- parts


def _store(run: Run) -> Store:
    assert run.store
    return open_store(run.store)


def _checkpoint(run: Run, step: int) -> str:
    return f"{run.stage}/{CHECKPOINTS}/{run.checkpoint_path(step).name}"


def _steps(store: Store, run: Run) -> list[str]:
    """Names of the whole checkpoints, the newest last."""
    return [name for name in store.list(f"{run.stage}/{CHECKPOINTS}") if name.startswith("step-")]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _files(run: Run) -> list[Path]:
    """Those that workers write."""
    found = (path for path in run.folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in found if path.name not in DRIVERS)


def _is_log(name: str) -> bool:
    return fnmatch.fnmatch(name, "worker-*.log")


def _folders(folder: Path) -> list[Path]:
    """Those in a folder that are whole, a stage's checkpoints and scratch excepted."""
    found = (path for path in folder.iterdir() if path.is_dir() and path.suffix != ".tmp") if folder.is_dir() else ()
    return sorted(path for path in found if path.name not in (CHECKPOINTS, SCRATCH))


def _pull_files(store: Store, prefix: str, folder: Path) -> None:
    """Logs stay where they were written."""
    names = {name for name in store.files(prefix) if not _is_log(name) and not name.startswith(".")}
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.is_file() and path.name not in names and not _is_log(path.name):
            path.unlink()
    for name in sorted(names):
        store.pull(f"{prefix}/{name}".lstrip("/"), folder / name)


def _only(folder: Path, names: set[str]) -> None:
    """Delete the folders in a folder that have other names."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and path.name not in names:
            shutil.rmtree(path)
