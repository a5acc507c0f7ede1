"""Folders and files at a URI: S3, and whatever else pyarrow or fsspec opens.

    s3://BUCKET/PREFIX      also ?endpoint_override=http://HOST:PORT&region=REGION, or AWS_ENDPOINT_URL and AWS_REGION
    gs://  abfs://  file:// pyarrow's other file systems; fsspec's, where its package is installed

A folder is kept as its files, each under its own name, and KEY/.index.json: their sizes and hashes, written last. A
folder without an index was never finished and is nobody's. A file that changed is sent under another name, so that the
version before stays whole until the new index stands; then it is deleted. Large files go up in parts, and every request
is tried again for about a minute. Credentials are found as the AWS SDK does it: in the environment, in ~/.aws, or by
the machine's role.

Leaves out: two writers of one key at a time, one file over several connections.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

from training.run import commit_folder, write_atomic

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

INDEX = ".index.json"
ATTEMPTS = 8  # of every request to S3, with growing pauses: together up to a minute
_AT_ONCE = 8  # files
_CHUNK = 8 << 20  # bytes
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_OBJECTS = ("s3", "gcs", "abfs")  # file systems where an object appears whole, and needs no folder made for it

T = TypeVar("T")
Given = TypeVar("Given")


class StoreError(ValueError):
    """A store that cannot be used; the message names the URI, the cause and the fix.

    `may_pass`: nobody has to mend anything, the same may succeed later.
    """

    may_pass = False


@dataclass(frozen=True)
class Entry:
    """A file of a committed folder."""

    size: int  # bytes
    sha256: str
    name: str  # of the object that holds it, below the folder's key


Index = dict[str, Entry]  # by path in the folder


def is_uri(name: str) -> bool:
    """Whether `name` has a scheme; what has none is a path, a hub's name or a sample's."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def join(uri: str, key: str) -> str:
    """The URI of what lies at `key` below another; its query stays at the end."""
    location, question, query = uri.partition("?")
    return f"{location.rstrip('/')}/{key}{question}{query}"


def check(uri: str) -> None:
    """Write, read and delete a small object; raises StoreError where one of the three is not possible."""
    store = open_store(uri, attempts=3)
    key = f".check-{uuid.uuid4().hex[:8]}"
    store.write(key, b"chatforge")
    store.read(key)
    store.delete(key)


@functools.cache
def open_store(uri: str, attempts: int = ATTEMPTS) -> "Store":
    """What is at a URI, or will be; asks nothing of it yet. Raises StoreError for a URI that nothing opens."""
    if not is_uri(uri) or not uri.partition("://")[2].strip("/"):
        raise StoreError(f"{uri}: is no URI; write it as s3://BUCKET/PREFIX")
    with _explained(uri, "opened"):
        files, base = _s3(uri, attempts) if uri.startswith("s3://") else _others(uri)
    return Store(uri, files, base.rstrip("/"))


def _s3(uri: str, attempts: int) -> tuple["FileSystem", str]:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    location, endpoint = uri.partition("?")[0].removeprefix("s3://"), _said(uri, "endpoint_override", *_ENDPOINTS)
    region = _said(uri, "region", "AWS_REGION", "AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else resolve_s3_region(location.partition("/")[0])
    files = S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=10,
        allow_delayed_open=True,  # one request for a small object
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=attempts),
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
    )
    return files, location


def _said(uri: str, parameter: str, *variables: str) -> str | None:
    """What the URI's query, or else the environment, has under these names."""
    given = dict(parse_qsl(uri.partition("?")[2])).get(parameter)
    return given or next(filter(None, map(os.environ.get, variables)), None)


def _others(uri: str) -> tuple["FileSystem", str]:
    import fsspec
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        return FileSystem.from_uri(uri)
    except ArrowInvalid:  # not one of its own schemes
        files, base = fsspec.url_to_fs(uri)
        return PyFileSystem(FSSpecHandler(files)), base


class Store:
    """Folders and files by key, which is a path below the store's URI. Every method raises StoreError."""

    def __init__(self, uri: str, files: "FileSystem", base: str) -> None:
        self.uri = uri
        self._files = files
        self._base = base
        self._is_whole = files.type_name in _OBJECTS

    # ---- folders

    def push(self, source: Path, key: str) -> None:
        """Keep a folder or a file at `key`: the new version whole, or the one before it."""
        if source.is_dir():
            self.commit(key, self.upload(source, key))
        else:
            self.write(key, source.read_bytes())

    def upload(self, folder: Path, key: str) -> Index:
        """Send what the committed version does not have; nobody sees it before `commit`.

        Several machines may each send their part of one folder: `commit` gets what all of these calls returned.
        """
        before = self.index(key) or {}
        taken = {entry.name for entry in before.values()}
        paths = sorted(path for path in folder.rglob("*") if path.is_file())

        def send(path: Path) -> tuple[str, Entry]:
            name = path.relative_to(folder).as_posix()
            known = before.get(name)
            if known and _is_in(path, known):
                return name, known
            return name, self._send(path, key, f"{name}.{uuid.uuid4().hex[:8]}" if name in taken else name)

        return dict(_together(send, paths))

    def commit(self, key: str, index: Index) -> None:
        """From here on the folder at `key` is what `index` says; what else lies there is deleted."""
        listed = {path: asdict(entry) for path, entry in sorted(index.items())}
        self.write(f"{key}/{INDEX}", json.dumps(listed, indent=1).encode())
        kept = {entry.name for entry in index.values()} | {INDEX}
        for name in self.objects(key).keys() - kept:
            with self._explained("deleted", f"{key}/{name}"):
                self._files.delete_file(self._path(f"{key}/{name}"))

    def pull(self, key: str, target: Path) -> None:
        """Make `target` what is kept at `key`: what differs is fetched, checked and put in its place by one rename."""
        index = self.index(key)
        if index is None:
            write_atomic(target, self.read(key))
            return
        found = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
        same = {path for path, entry in index.items() if path in found and _is_in(found[path], entry)}
        if same == index.keys() == found.keys() and target.is_dir():
            return
        temporary = target.with_name(target.name + ".tmp")
        for name in same:
            _link(found[name], temporary / name)
        self.fetch(key, {name: entry for name, entry in index.items() if name not in same}, temporary)
        for path in [path for path in temporary.rglob("*") if path.is_file()]:
            if path.relative_to(temporary).as_posix() not in index:  # of an attempt at another version
                path.unlink()
        commit_folder(temporary, target)

    def fetch(self, key: str, index: Index, folder: Path) -> None:
        """Files of a folder at `key` into `folder`, those excepted that are there already."""
        folder.mkdir(parents=True, exist_ok=True)
        missing = [(path, entry) for path, entry in index.items() if not _is_in(folder / path, entry)]
        require_room(self.uri, folder, sum(entry.size for _, entry in missing))
        _together(lambda item: self._receive(f"{key}/{item[1].name}".lstrip("/"), item[1], folder / item[0]), missing)

    def index(self, key: str) -> Index | None:
        """What a committed folder holds; None where there is none."""
        name = f"{key}/{INDEX}"
        if not self._exists(name):
            return None
        try:
            return {path: Entry(**entry) for path, entry in json.loads(self.read(name)).items()}
        except (ValueError, TypeError) as error:
            raise StoreError(f"{join(self.uri, name)}: is no index: {error}; delete the folder") from None

    # ---- single objects

    def read(self, key: str) -> bytes:
        with self._explained("read", key), self._files.open_input_stream(self._path(key)) as stream:
            return stream.read()

    def write(self, key: str, content: bytes) -> None:
        """The old content or the new one, never a part."""
        with self._explained("written", key), self._writer(key) as stream:
            stream.write(content)

    def exists(self, key: str) -> bool:
        """Whether a file or a committed folder is at `key`."""
        return self._exists(key) or self._exists(f"{key}/{INDEX}")

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Names of the committed folders directly at `prefix`, in order."""
        below = f"{prefix}/" if prefix else ""
        return tuple(name for name in self.folders(prefix) if self._exists(f"{below}{name}/{INDEX}"))

    def folders(self, prefix: str = "") -> tuple[str, ...]:
        """Names of all folders directly at `prefix`, committed or not, in order."""
        return tuple(sorted(i.base_name for i in self._select(prefix, recursive=False) if not i.is_file))

    def files(self, prefix: str = "") -> tuple[str, ...]:
        """Names of the files directly at `prefix`, in order."""
        return tuple(sorted(i.base_name for i in self._select(prefix, recursive=False) if i.is_file))

    def objects(self, prefix: str = "") -> dict[str, "FileInfo"]:
        """Every object below `prefix`, by its path from there: size and time of its last change."""
        start = len(self._path(prefix)) + 1
        return {info.path[start:]: info for info in self._select(prefix, recursive=True) if info.is_file}

    def etag(self, key: str) -> str:
        """What S3 says of an object's content; empty elsewhere."""
        if self._files.type_name != "s3":
            return ""
        with self._explained("read", key), self._files.open_input_stream(self._path(key)) as stream:
            return (stream.metadata() or {}).get("ETag", b"").decode()

    def delete(self, key: str) -> None:
        """Delete a file, or all folders from there on, their indexes first; nothing where there is nothing."""
        with self._explained("deleted", key):
            if self._exists(key):
                self._files.delete_file(self._path(key))
            below = self.objects(key)
            for name in (name for name in below if name.rpartition("/")[2] == INDEX):
                self._files.delete_file(self._path(f"{key}/{name}"))
            if below:
                self._files.delete_dir(self._path(key))

    # ---- one request each

    def _send(self, path: Path, key: str, name: str) -> Entry:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file, self._explained("written", f"{key}/{name}"), self._writer(f"{key}/{name}") as out:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
                size += len(chunk)
        return Entry(size, digest.hexdigest(), name)

    def _receive(self, key: str, entry: Entry, target: Path) -> None:
        """Raises StoreError where what comes is not what was sent."""
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        source = self._path(key)
        with self._explained("read", key), self._files.open_input_stream(source) as stream, target.open("wb") as file:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
        size, hashed = target.stat().st_size, digest.hexdigest()
        if size != entry.size or (entry.sha256 and hashed != entry.sha256):
            target.unlink()
            raise StoreError(
                f"{join(self.uri, key)}: is not what was written there ({size} bytes of sha256 {hashed[:12]} instead "
                f"of {entry.size} of {entry.sha256[:12] or 'any'}); delete its folder, so that it is made again"
            )

    @contextmanager
    def _writer(self, key: str) -> Iterator[Any]:
        path = self._path(key)
        if self._is_whole:
            with self._files.open_output_stream(path) as stream:
                yield stream
            return
        parent, _, name = path.rpartition("/")
        temporary = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        self._files.create_dir(parent, recursive=True)
        with self._files.open_output_stream(temporary) as stream:
            yield stream
        self._files.move(temporary, path)

    def _exists(self, key: str) -> bool:
        with self._explained("read", key):
            return self._files.get_file_info(self._path(key)).is_file

    def _select(self, prefix: str, recursive: bool) -> Iterable["FileInfo"]:
        from pyarrow.fs import FileSelector

        below = FileSelector(self._path(prefix), allow_not_found=True, recursive=recursive)
        with self._explained("listed", prefix):
            return self._files.get_file_info(below)

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}" if key else self._base

    def _explained(self, doing: str, key: str) -> Any:
        return _explained(join(self.uri, key) if key else self.uri, doing)


# ---- errors

# What a message says, what is to be done, and whether it stays so until that is done.
_CAUSES = (
    ("NO_SUCH_BUCKET|NoSuchBucket", "there is no such bucket; create it, or correct the URI", True),
    (
        "INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|EXPIRED_TOKEN",
        "the credentials are not valid; renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
        True,
    ),
    ("ACCESS_DENIED|status 403", "access is denied; {credentials}", True),
    ("NETWORK_CONNECTION|curlCode", "no connection to {endpoint}; correct AWS_ENDPOINT_URL, or the network", False),
    ("PERMANENT_REDIRECT|status 301", "the bucket is in another region; set AWS_REGION", True),
    ("No space left", "the local disk is full; free some, or set CHATFORGE_CACHE to a folder on a larger one", True),
)


@contextmanager
def _explained(uri: str, doing: str) -> Iterator[None]:
    """Turns what a file system raises into a StoreError."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        cause, lasts = _cause(uri, error)
        explained = StoreError(f"{uri}: cannot be {doing}: {cause}")
        explained.may_pass = not lasts
        raise explained from error


def _cause(uri: str, error: Exception) -> tuple[str, bool]:
    """What is wrong, and whether it stays so until somebody mends it."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    endpoint = _said(uri, "endpoint_override", *_ENDPOINTS) or "S3"
    for pattern, cause, lasts in _CAUSES:
        if re.search(pattern, said):
            return cause.format(credentials=_credentials(), endpoint=endpoint), lasts
    return said, isinstance(error, ValueError | ImportError)


def _credentials() -> str:
    """What is to be done where S3 says no."""
    sources = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if any(map(os.environ.get, sources)) or (Path.home() / ".aws" / "credentials").exists():
        return "give these credentials s3:GetObject, PutObject, DeleteObject and ListBucket there"
    return "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"


def require_room(uri: str, folder: Path, size: int) -> None:
    """Raises StoreError where `size` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StoreError(
            f"{uri}: {size / 1e9:.2f} GB are needed in {folder}, whose disk has {free / 1e9:.2f} GB left: free "
            "some, or set CHATFORGE_CACHE to a folder on a larger disk"
        )


# ---- local files


def _is_in(path: Path, entry: Entry) -> bool:
    """Whether a file is what an entry says."""
    return path.is_file() and path.stat().st_size == entry.size and sha256(path) == entry.sha256


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    os.link(source, target)


def _together(do: Callable[[Given], T], items: Iterable[Given]) -> list[T]:
    """`do` of every item, several at a time; what the first that fails raises is raised."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            return list(pool.map(do, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
