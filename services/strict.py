"""Strict configs: every unknown key, and every value of another type, is refused in a line with its key and the fix."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

_Model = TypeVar("_Model", bound=BaseModel)


class ServerConfigError(ValueError):
    """A server that cannot start; the message names the key, the value and the fix."""


class Strict(BaseModel):
    """What a file or a command line says, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def validated(kind: type[_Model], tree: Any, at: str = "") -> _Model:
    """`tree` as a `kind`. Raises ServerConfigError, a line for each mistake; `at` stands before every key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ServerConfigError("\n".join(at + _explained(kind, dict(e)) for e in error.errors())) from None


def _explained(kind: type[BaseModel], error: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, and what is valid there."""
    where = [part for part in error["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in where)
    if error["type"] == "extra_forbidden":
        keys = _keys_beside(kind, where)
        return f"{key}: no such key; valid: {', '.join(keys)}{nearest(str(where[-1]), keys)}"
    if error["type"] == "missing":
        return f"{key}: is required and has no default"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], Mapping):  # of a whole config, whose key it names
        return f"{key}: {message}" if key else message
    if error["type"] == "literal_error":
        message += nearest(str(error["input"]), re.findall(r"'([^']*)'", message))
    return f"{key}={error['input']!r}: {message}" if key else message


def _keys_beside(kind: Any, where: list[str | int]) -> list[str]:
    for part in where[:-1]:
        is_config = isinstance(kind, type) and issubclass(kind, BaseModel)
        kind = kind.model_fields[part].annotation if is_config else get_args(kind)[-1]
    return list(kind.model_fields)


def nearest(word: str, valid: Iterable[str]) -> str:
    """What to put behind a mistake's message: the valid word that was meant, where one is near."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
