"""Local copies of data and model folders that a recipe names by a URI, in a cache that stays below a bound.

    s3://bucket/chats.jsonl   s3://bucket/text/**/*.txt   s3://bucket/news.{de,en}   s3://bucket/models/base

A copy is of what was at the URI when it was made: content that changes makes another one. It is locked for as long as
a process lives that has used it; of the others, the one that was not used for the longest time goes first.

    CHATFORGE_CACHE      the folder; default runs/.cache
    CHATFORGE_CACHE_GB   the bound; default 50
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from training.run import commit_folder
from training.store import Entry, Index, Store, StoreError, open_store

ETAGS = 1000  # files: an etag takes a request each; of more files, size and time are enough

_MAGIC = re.compile(r"[*\[{]")
_in_use: dict[Path, int] = {}  # lock → its descriptor, open while this process lives


def cache_folder() -> Path:
    return Path(os.environ.get("CHATFORGE_CACHE") or "runs/.cache")


def cache_bytes() -> int:
    """Raises StoreError where CHATFORGE_CACHE_GB is no number."""
    said = os.environ.get("CHATFORGE_CACHE_GB") or "50"
    try:
        return int(float(said) * 1e9)
    except ValueError:
        raise StoreError(f"CHATFORGE_CACHE_GB={said}: is no number of gigabytes") from None


def content_id(uri: str) -> str:
    """What is at a URI, in few characters, from hashes, etags, sizes and times; reads no content.

    Raises StoreError where nothing is there, or it cannot be looked at.
    """
    return f"uri:{_look(uri).digest}"


def local_copy(uri: str, cache: Path | None = None, max_bytes: int | None = None) -> Path:
    """A path of this disk that stands for a URI: of a file, a folder, a glob, or twin files.

    Several processes may ask at a time: one fetches. Raises StoreError where there is nothing, it cannot be read, it
    changes in between, or the disk or the bound has no room for it.
    """
    found = _look(uri)
    copies = (cache or cache_folder()).resolve() / "copies"
    folder = copies / found.digest
    lock = copies / f"{found.digest}.lock"
    while not _hold(lock, folder):
        with locked(lock):
            if not folder.exists():
                shutil.rmtree(_temporary(folder), ignore_errors=True)
                _make_room(copies, found.size, cache_bytes() if max_bytes is None else max_bytes, uri)
                _fetch(found, uri, folder)
    return folder / found.path


# ---- what is there


@dataclass(frozen=True)
class _Found:
    """What a URI stands for."""

    store: Store  # at the folder that the names start from
    files: Index  # by path in the copy; sha256 is empty where the store does not know it
    versions: tuple[str, ...]  # of every file: an etag, or a time
    path: str  # in the copy: what the URI's name becomes

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files.values())

    @property
    def digest(self) -> str:
        listed = [(path, entry.size, entry.sha256) for path, entry in self.files.items()]
        told = json.dumps([self.path, listed, self.versions])
        return hashlib.sha256(told.encode()).hexdigest()[:24]


def _look(uri: str) -> _Found:
    location, question, query = uri.partition("?")
    location = location.rstrip("/")
    magic = _MAGIC.search(location)
    start = (location[: magic.start()] if magic else location).rpartition("/")[0]
    name = location[len(start) + 1 :]
    store = open_store(f"{start}{question}{query}")
    if not magic:
        return _one(uri, store, name)
    matching = _patterns(name)
    return _listed(uri, store, lambda path: any(pattern.fullmatch(path) for pattern in matching), "", name)


def _one(uri: str, store: Store, name: str) -> _Found:
    """A folder that `push` has left; a file, with what its records are read from beside it; any folder."""
    if (index := store.index(name)) is not None:
        files = {f"{name}/{p}": Entry(entry.size, entry.sha256, f"{name}/{entry.name}") for p, entry in index.items()}
        return _Found(store, files, (), name)
    from training.data.sources import METADATA

    if name == METADATA:  # it names the pictures beside it
        return _listed(uri, store, lambda path: True, "", name)
    if store.exists(name):
        beside = {name, f"{name.removesuffix('.npz')}.jsonl"} if name.endswith(".npz") else {name}
        return _listed(uri, store, lambda path: path in beside, "", name)
    return _listed(uri, store, lambda path: True, f"{name}/", name)


def _listed(uri: str, store: Store, wanted: Callable[[str], bool], below: str, path: str) -> _Found:
    """The objects whose names, from `below` on, are wanted."""
    objects = {f"{below}{name}": info for name, info in store.objects(below.rstrip("/")).items() if wanted(name)}
    if not objects:
        raise StoreError(f"{uri}: there is nothing; correct the URI, or put the data there")
    few = len(objects) <= ETAGS
    with ThreadPoolExecutor(16) as pool:
        versions = pool.map(lambda name: (few and store.etag(name)) or str(objects[name].mtime_ns), objects)
        return _Found(store, {n: Entry(i.size, "", n) for n, i in objects.items()}, tuple(versions), path)


def _patterns(glob: str) -> list[re.Pattern[str]]:
    """`**/news.{de,en}` as regular expressions, one for every choice."""
    from fsspec.utils import glob_translate

    parts = re.split(r"\{([^{}]*)\}", glob)  # every second one is a list of choices
    choices = [part.split(",") if number % 2 else [part] for number, part in enumerate(parts)]
    return [re.compile(glob_translate("".join(chosen))) for chosen in product(*choices)]


# ---- the cache


def _fetch(found: _Found, uri: str, folder: Path) -> None:
    temporary = _temporary(folder)
    found.store.fetch("", found.files, temporary)
    if _look(uri).digest != found.digest:
        raise StoreError(f"{uri}: changes while it is copied; try again when it is whole")
    commit_folder(temporary, folder)


def _hold(lock: Path, folder: Path) -> bool:
    """Whether the copy is there; if it is, it stays for as long as this process lives."""
    if lock in _in_use and not folder.exists():  # somebody has emptied the cache by hand
        os.close(_in_use.pop(lock))
    if lock not in _in_use:
        file = _open(lock)
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for one that fetches
        if not folder.exists():
            os.close(file)
            return False
        _in_use[lock] = file
    os.utime(lock)
    return True


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """One process of this disk at a time; the lock goes with the process."""
    file = _open(lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _open(lock: Path) -> int:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            f"{lock.parent}: cannot be written here ({error.strerror}): set CHATFORGE_CACHE to a folder that "
            "every node can write"
        ) from None


def _make_room(copies: Path, size: int, bound: int, uri: str) -> None:
    """Delete copies that no process uses, the oldest use first, until `size` more bytes stay below the bound."""
    held = {folder: _size(folder) for folder in copies.iterdir() if folder.is_dir()}
    over = sum(held.values()) + size - bound
    for folder in sorted(held, key=lambda folder: _lock_of(folder).stat().st_mtime):
        if over > 0 and _drop(folder):
            over -= held.pop(folder)
    if over > 0:
        raise StoreError(
            f"{uri}: {size / 1e9:.2f} GB do not fit into the cache of {bound / 1e9:.2f} GB, of which "
            f"{sum(held.values()) / 1e9:.2f} GB are in use: raise CHATFORGE_CACHE_GB"
        )


def _drop(folder: Path) -> bool:
    """Whether it could be deleted: not where a process uses it, or fetches it."""
    file = _open(_lock_of(folder))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _temporary(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name.partition('.')[0]}.lock")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
