"""Where data comes from: the source strings of every recipe list, and the rows behind them.

    corpus/*.txt  chats.jsonl  data/**/*.parquet  pages.jsonl.gz     files and globs
    pairs.tsv  locale/*.po  news.{de,en}                             sentence pairs: columns, catalogues, twin files
    pictures/  pictures/metadata.jsonl  shard-*.tar  pictures.npz    captioned pictures (captions.py)
    hub:owner/name[/subset][:split]                                  a data set of the Hugging Face hub; split: train
    sample:chitchat                                                  demo data out of an installed package (samples.py)
    s3://bucket/chats.jsonl                                          any of the files, globs and twins (copies.py)

Imports nothing heavy, so that a pipeline can check and fingerprint its sources before anything starts.
"""

import contextlib
import glob
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from training.copies import content_id, local_copy
from training.data import archives
from training.data.records import DataError, Fields, Line, json_lines, open_file, text_lines
from training.store import is_uri

Parsed = TypeVar("Parsed")

METADATA = "metadata.jsonl"  # in a folder of pictures: a line for each, with its file_name and caption


@dataclass(frozen=True)
class Source:
    """One entry of a recipe's list, known to exist (hub and URI: not yet looked at)."""

    name: str  # as the recipe has it
    kind: Literal["files", "twins", "hub", "sample", "uri"]
    paths: tuple[Path, ...] = ()  # files: sorted; twins: in the order of the braces


def resolve(sources: Sequence[str]) -> list[Source]:
    """What each source string stands for; raises DataError naming the first that matches nothing."""
    return [_resolve(name) for name in sources]


def fingerprint(sources: Sequence[str]) -> dict[str, str]:
    """Source -> what its content is: sha256 of files, etags at a URI, revision of a hub data set, version of a sample.

    Manifests hold it, so a stage whose data changed is stale. Raises DataError as `resolve` does.
    """
    return {source.name: _content_id(source) for source in resolve(sources)}


def read(sources: Sequence[str], parse: Callable[[Fields], Iterable[Parsed]]) -> Iterator[Parsed]:
    """Every record of the sources in order, as `parse` makes it from the record's fields.

    `parse` returns what one record holds (nothing, one or many) and raises ValueError where the record is wrong. All
    records are looked at; then one DataError points to the first bad one and counts the rest.
    """
    yield from read_placed(sources, lambda _, fields: parse(fields))


def read_placed(sources: Sequence[str], parse: Callable[[str, Fields], Iterable[Parsed]]) -> Iterator[Parsed]:
    """As `read`, and `parse` is also told where the record stands: FILE:LINE, TAR:MEMBER, hub:OWNER/NAME:ROW."""
    first, bad = "", 0
    for source in resolve(sources):
        empty = True
        for where, row in _rows(source):
            empty = False
            try:
                parsed = list(parse(where, row.fields() if isinstance(row, Line) else row))
            except ValueError as error:
                first = first or f"{where}: {error}" + (f" (a copy of {source.name})" if source.kind == "uri" else "")
                bad += 1
                continue
            yield from parsed
        if empty:
            raise DataError(f"{source.name}: holds no records")
    if bad:
        rest = f" (and {bad - 1} more bad record{'s' if bad > 2 else ''})" if bad > 1 else ""
        raise DataError(first + rest)


def record_key(fields: Fields, otherwise: str) -> str:
    """What the split hashes: the record's own `id`, or a text that stands for it (see split.normalised)."""
    given = fields.get("id")
    if given is None:
        return otherwise
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise ValueError(f"id: must be a text or a whole number, not {given!r}")
    return str(given)


def _resolve(name: str) -> Source:
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "hub":
        _hub_parts(name)
        return Source(name, "hub")
    if colon and scheme == "sample":
        import training.data.samples as samples

        samples.check(rest)
        return Source(name, "sample")
    if is_uri(name):
        return Source(name, "uri")
    if braces := _BRACES.search(name):
        return Source(name, "twins", _twin_files(name, braces))
    return Source(name, "files", _matching_files(name))


_BRACES = re.compile(r"\{([\w-]+),([\w-]+)\}")


def _twin_files(name: str, braces: re.Match[str]) -> tuple[Path, ...]:
    """The two files of `news.{de,en}`, whose n-th lines translate one another."""
    paths = tuple(Path(name.replace(braces[0], part)).expanduser() for part in braces.groups())
    if absent := next((path for path in paths if not path.is_file()), None):
        raise DataError(f"{name}: there is no file {absent}")
    return paths


def _matching_files(pattern: str) -> tuple[Path, ...]:
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        if (expanded / METADATA).is_file():
            return (expanded / METADATA,)
        files = f"name its files, as in {pattern.rstrip('/')}/*.jsonl"
        raise DataError(f"{pattern}: is a folder; {files} (a folder of pictures holds a {METADATA})")
    literal = [str(expanded)] if expanded.is_file() else glob.glob(str(expanded), recursive=True)
    paths = tuple(sorted(path for path in map(Path, literal) if path.is_file()))
    if not paths:
        raise DataError(f"{pattern}: matches no file (a source is a path, a glob, hub:OWNER/NAME or sample:NAME)")
    for path in paths:
        if _format(path) not in _READERS:
            known = f"{', '.join(_READERS)} (all but .npz also as .gz)"
            raise DataError(f"{path}: not a format that is read here; use {known}")
    return paths


def _format(path: Path) -> str:
    """What `_READERS` knows it by; an .npz is packed in itself, and is none of them in a .gz."""
    return path.suffix if path.suffix != ".gz" or path.stem.endswith(".npz") else Path(path.stem).suffix


def _hub_parts(name: str) -> tuple[str, str | None, str]:
    """Repository, subset and split of `hub:owner/name[/subset][:split]`."""
    location, _, split = name.removeprefix("hub:").partition(":")
    parts = location.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{name}: write it as hub:OWNER/NAME, hub:OWNER/NAME/SUBSET, either with :SPLIT")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


def _content_id(source: Source) -> str:
    if source.kind == "sample":
        import training.data.samples as samples

        return samples.version(source.name.removeprefix("sample:"))
    if source.kind == "hub":
        return _hub_revision(source.name)
    if source.kind == "uri":
        return content_id(source.name)
    whole = hashlib.sha256()
    for path in itertools.chain.from_iterable(map(with_pictures, source.paths)):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{whole.hexdigest()}"


def with_pictures(path: Path) -> Iterator[Path]:
    """A file, and the files that its records are read from beside it: what is there of them."""
    yield path
    if path.suffix == ".npz":
        yield from filter(Path.is_file, [archives.beside(path)])
    elif path.name == METADATA:
        for _, line in _json_rows(path):
            with contextlib.suppress(ValueError):  # reading it will point to it
                name = line.fields().get("file_name")
                yield from filter(Path.is_file, [path.parent / name] if isinstance(name, str) else [])


def _hub_revision(name: str) -> str:
    from huggingface_hub import HfApi

    repository, _, _ = _hub_parts(name)
    try:
        return f"revision:{HfApi().dataset_info(repository).sha}"
    except Exception as error:  # its HTTP client's classes are not ours to know
        raise DataError(f"{name}: the hub gives no such data set: {error}") from error


def _rows(source: Source) -> Iterator[tuple[str, Line | Fields]]:
    """(where it stands, the row)."""
    if source.kind == "sample":
        import training.data.samples as samples

        for number, row in enumerate(samples.read(source.name.removeprefix("sample:")), 1):
            yield f"{source.name}:{number}", row
    elif source.kind == "twins":
        yield from _twin_rows(source)
    elif source.kind == "hub":
        yield from _hub_rows(source.name)
    elif source.kind == "uri":
        yield from _rows(_resolve(str(local_copy(source.name))))
    else:
        for path in source.paths:
            yield from _READERS[_format(path)](path)


def _json_rows(path: Path) -> Iterator[tuple[str, Line]]:
    yield from ((where, Line(line)) for where, line in json_lines(path))


def _text_rows(path: Path) -> Iterator[tuple[str, Fields]]:
    """One row a document; blank lines part them, a single newline stays inside."""
    block: list[str] = []
    start = 1
    for number, text in text_lines(path):
        if text.strip():
            start = start if block else number
            block.append(text)
        elif block:
            yield f"{path}:{start}", {"text": "\n".join(block)}
            block = []
    if block:
        yield f"{path}:{start}", {"text": "\n".join(block)}


def _tsv_rows(path: Path) -> Iterator[tuple[str, Fields]]:
    yield from ((f"{path}:{number}", {"columns": text.split("\t")}) for number, text in text_lines(path) if text)


def _po_rows(path: Path) -> Iterator[tuple[str, Fields]]:
    """What a gettext catalogue has translated, by language; its message ids are taken to be English.

    Fuzzy and empty messages are no translations.
    """
    from babel.messages.pofile import PoFileError, read_po

    with open_file(path) as file:
        try:
            catalogue = read_po(file, abort_invalid=True)
        except (PoFileError, ValueError, LookupError) as error:
            raise DataError(f"{path}: not a gettext catalogue: {error}") from None
    language = str(catalogue.locale_identifier or "").replace("_", "-")
    if not language:
        raise DataError(f"{path}: its header names no Language")
    for message in catalogue:
        if message.id and not message.fuzzy:
            english, translated = ([text] if isinstance(text, str) else text for text in (message.id, message.string))
            for english_form, form in zip(english or (), translated or (), strict=False):  # plurals have several
                if form:
                    yield f"{path}:{message.lineno}", {"translation": {"en": english_form, language: form}}


def _twin_rows(source: Source) -> Iterator[tuple[str, Fields]]:
    names = next(iter(_BRACES.findall(source.name)))
    both = itertools.zip_longest(*(text_lines(path) for path in source.paths))
    for number, (first, second) in enumerate(both, 1):
        if first is None or second is None:
            short, long = source.paths if first is None else source.paths[::-1]
            raise DataError(f"{short}: ends before line {number}, which {long} has: twin files have equal lines")
        yield f"{source.paths[0]}:{number}", {"translation": dict(zip(names, (first[1], second[1]), strict=True))}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Line | Fields]]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".parquet": archives.parquet_rows,
    ".tsv": _tsv_rows,
    ".po": _po_rows,
    ".tar": archives.tar_rows,
    ".npz": archives.npz_rows,
}


def _hub_rows(name: str) -> Iterator[tuple[str, Fields]]:
    import datasets

    repository, subset, split = _hub_parts(name)
    try:
        rows = datasets.load_dataset(repository, subset, split=split)
    except Exception as error:  # of its HTTP client, of any file format
        raise DataError(f"{name}: cannot be loaded from the hub: {error}") from error
    yield from archives.hub_rows(rows, name)
