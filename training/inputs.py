"""Which files of this machine a recipe reads: those that have to go along where it runs on another.

A relative path is a file of this machine. An absolute one (or one of the home folder) is taken to be a path that the
other machine has, and `hub:`, `sample:` and URIs are fetched there: none of them is looked at here.
"""

from collections.abc import Iterator
from pathlib import Path

from training.config import PIXELS, ConfigError, StageConfig
from training.data.sources import resolve, with_pictures
from training.recipe import MODELS, SOURCES, Recipe


def local_inputs(recipe: Recipe) -> dict[str, tuple[Path, ...]]:
    """What names a relative path, as in pretrain.text='data/a.txt' -> every file that is read under this name.

    Raises DataError where a source matches no file, ConfigError where a stage starts from a model folder: those are
    large, and do not go along.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for stage, config in recipe.stages.items():
        _check_models(stage, config)
        for field, name in _sources(stage, config):
            if _is_local(name):
                (source,) = resolve([name])
                found[f"{stage}.{field}={name!r}"] = tuple(f for path in source.paths for f in with_pictures(path))
    return found


def _sources(stage: str, config: StageConfig) -> Iterator[tuple[str, str]]:
    for field in SOURCES:
        if stage != "evaluate" and field not in config.runtime:  # else they are texts
            yield from ((field, name) for name in getattr(config, field, None) or [])


def _check_models(stage: str, config: StageConfig) -> None:
    for field in MODELS:
        model = getattr(config, field, None)
        # What is no folder here may be the hub's name for a model.
        if model and model != PIXELS and _is_local(model) and (Path(model).is_dir() or model.startswith(".")):
            raise ConfigError(
                f"{stage}.{field}={model!r}: a model folder is not sent along; name it by an absolute path that every "
                "node of the cluster has, or by a URI"
            )


def _is_local(name: str) -> bool:
    return not (name.startswith(("hub:", "sample:", "~")) or "://" in name or Path(name).is_absolute())
