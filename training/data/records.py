"""What a record is before it is validated, and what is raised where it is not valid."""

from typing import Any

from training.run import StageError

Fields = dict[str, Any]


class DataError(StageError):
    """Data that cannot be used; the message points to the source, and to the first bad record in it."""
