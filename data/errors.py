"""What is wrong with a data set, said in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataError(ValueError):
    """A data set that cannot be used; the message names the files and the remedy."""


@contextmanager
def in_utf8(path: Path) -> Iterator[None]:
    """Raises DataError where what is read of `path` is in another encoding."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
