"""What files, models and a stage's result are known by: SHA-256 of their content."""

import hashlib
from pathlib import Path, PurePath

from training import mirror
from training.copies import content_id
from training.run import Run
from training.store import is_uri, sha256


def output_hash(run: Run) -> str:
    """Of what the stage has made: rankings, an evaluation, or else the model folder."""
    for name in ("rankings.jsonl", "evaluation.json"):
        if (run.folder / name).exists():
            return sha256(run.folder / name)
    index = mirror.model_index(run)  # the model may be on another node's disk
    if index is None:
        return model_id(str(run.model))
    return _folder_hash({PurePath(path): entry.sha256 for path, entry in index.items()})


def model_id(name: str) -> str:
    """What a model's content is; a hub name, which is neither folder nor URI, stands for itself."""
    if is_uri(name):
        return content_id(name)
    folder = Path(name)
    if not folder.is_dir():
        return name
    return _folder_hash({path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()})


def _folder_hash(files: dict[PurePath, str]) -> str:
    """Of the hash of every file; what says which run a model is of counts for nothing."""
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.name != "chatforge.json"):
        digest.update(f"{path}\0".encode() + bytes.fromhex(files[path]))
    return digest.hexdigest()
