"""What of this machine goes along with a job: our packages, the recipe, and the small files that the recipe names.

    training/ serving/ services/ chatforge/   the code as it is here, without what .gitignore names
    NAME.yaml                                 the resolved recipe
    data/chats.jsonl                          a file that the recipe names by a relative path, under that very name

Nothing else is looked at: no runs, no models, no environment, no data that the recipe does not name. An absolute path
is taken to be one that every node of the cluster has; `hub:`, `sample:` and URIs, the nodes fetch. Needs no Ray.
"""

import hashlib
import importlib.util
import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("training", "serving", "services", "chatforge")
LIMIT = 100 << 20  # bytes before compression; Ray's dashboard takes no larger request
ELSEWHERE = "name it by an absolute path that every node of the cluster has, or by a URI"
_OFFENDERS = 5  # files that an upload over the limit is explained with


class PackingError(ValueError):
    """An upload that is refused before anything is sent; the message names the file and the fix."""


@dataclass(frozen=True)
class Package:
    """A zip, ready to be sent."""

    data: bytes
    files: int
    size: int  # bytes before compression

    @property
    def uri(self) -> str:
        """Ray's name for it: the same content has the same, and is sent once."""
        return f"gcs://_ray_pkg_{hashlib.sha256(self.data).hexdigest()[:32]}.zip"

    def __str__(self) -> str:
        return f"{self.files} files, {amount(self.size)} ({amount(len(self.data))} to send)"


def pack(recipe: tuple[str, str], inputs: Mapping[str, Sequence[Path]], limit: int = LIMIT) -> Package:
    """The code, the recipe (its file name, its text) and the inputs: what names them -> relative paths of their files.

    Raises PackingError where an input cannot go along, or where all of it is more than `limit` bytes.
    """
    files = code_files(_installed(), Path(__file__).parents[1])
    for name, path in _input_files(inputs).items():
        if not path.samefile(files.setdefault(name, path)):
            raise PackingError(f"{path}: the code has a file of that name; rename it")
    _check_size(files, inputs, limit)
    contents: dict[str, bytes] = {name: path.read_bytes() for name, path in files.items()}
    contents[recipe[0]] = recipe[1].encode()
    return Package(_zipped(contents), len(contents), sum(map(len, contents.values())))


def code_files(packages: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """Name in the upload -> file, of every package's folder.

    Left out: what a .gitignore in `root` or below it names, whatever begins with a dot, caches of bytecode.
    """
    return {
        (Path(package) / path.relative_to(folder)).as_posix(): path
        for package, folder in packages.items()
        for path in _walk(folder, root)
    }


def amount(size: int) -> str:
    """Bytes for people: 512 B, 1.4 MiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _installed() -> dict[str, Path]:
    """Where our packages are, whether they are installed or a working tree; imports none of them."""
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        found[package] = Path(next(iter(spec.submodule_search_locations)))
    return found


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(name for name in folders if _is_wanted(here / name, root, folder=True))
        yield from (here / name for name in sorted(names) if _is_wanted(here / name, root))


def _is_wanted(path: Path, root: Path, folder: bool = False) -> bool:
    if path.name.startswith(".") or path.name == "__pycache__" or path.suffix == ".pyc":
        return False
    return (folder or path.is_file()) and not _is_ignored(path, root, folder)


def _is_ignored(path: Path, root: Path, folder: bool) -> bool:
    """As git has it: the nearest .gitignore with an opinion decides. Those above `root` have none."""
    from pathspec import GitIgnoreSpec

    for above in path.parents if root in path.parents else ():
        rules = above / ".gitignore"
        if rules.is_file():
            spec = GitIgnoreSpec.from_lines(rules.read_text("utf-8").splitlines())
            verdict = spec.check_file(f"{path.relative_to(above).as_posix()}{'/' if folder else ''}").include
            if verdict is not None:
                return verdict
        if above == root:
            break
    return False


def _input_files(inputs: Mapping[str, Sequence[Path]]) -> dict[str, Path]:
    files = {}
    for field, paths in inputs.items():
        for path in paths:
            name = _normal(path)
            if name.startswith("../"):
                raise PackingError(
                    f"{field}: only what lies in the folder that you submit from is sent along; submit from one that "
                    f"holds it, or {ELSEWHERE}"
                )
            files[name] = path
    return files


def _check_size(files: Mapping[str, Path], inputs: Mapping[str, Sequence[Path]], limit: int) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total <= limit:
        return
    fields = {_normal(path): field.partition("=")[0] for field, paths in inputs.items() for path in paths}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_OFFENDERS]
    said = (f"{name} {amount(sizes[name])}{f' ({fields[name]})' if name in fields else ''}" for name in largest)
    raise PackingError(
        f"the upload would be {amount(total)}, over the {amount(limit)} that are sent along; the largest: "
        f"{', '.join(said)}. Large data: {ELSEWHERE}; a file that the code does not need: name it in .gitignore"
    )


def _normal(path: Path) -> str:
    """`data/a.txt`, of `data/../data/a.txt`."""
    return Path(os.path.normpath(path)).as_posix()


def _zipped(contents: Mapping[str, bytes]) -> bytes:
    """The same bytes for the same content, whenever and wherever it was written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, contents[name])
    return buffer.getvalue()
