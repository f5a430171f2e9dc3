"""Where a zoo is: a folder, an fsspec URL, or an account on the Hub. One protocol, and the choice among versions.

    zoo, ./zoo, /data/zoo          a folder            s3://bucket/zoo, memory://zoo, https://...      fsspec
    hf://me                        the Hub: one repository me/NAME per adapter

The order of writing makes every place atomic: files first, `loragraft.json` after them, the index last. A reader goes by
the index (on the Hub: by one commit), so a publisher killed at any moment leaves what was there before, or all of the new.
"""

import difflib
import os
from pathlib import Path
from typing import Protocol

from loragraft.zoo.entry import Entry, Listed, Status, ZooError, version_numbers

DEFAULT = "zoo"
VARIABLE = "LORAGRAFT_ZOO"
HUB = "hf://"


class Place(Protocol):
    """A zoo that can be read, and written to where its owner may."""

    @property
    def url(self) -> str:
        """As a user names it."""
        ...

    def names(self) -> list[str]:
        """Of all adapters, sorted."""
        ...

    def listed(self) -> list[Listed]:
        """Every version of every adapter, in the index's order."""
        ...

    def versions(self, name: str) -> list[Listed]:
        """Of one adapter, oldest first; [] if there is none of that name."""
        ...

    def fetch(self, item: Listed, folder: Path) -> None:
        """Writes the files of `item` into `folder`; they are not to be trusted yet. Raises ZooError for sizes that differ."""
        ...

    def publish(self, entry: Entry, folder: Path) -> bool:
        """Takes the files of `folder`; False if this very version is there already. Raises ZooError if another is."""
        ...

    def set_status(self, name: str, version: str, status: Status) -> None:
        """Replaces what is said of a version that exists."""
        ...


def open_place(text: str | None = None, *, public: bool = False) -> Place:
    """The place that `text` names; without it $LORAGRAFT_ZOO, and without that the folder `zoo`.

    `public`: repositories that publishing creates on the Hub are open to everybody. Raises ZooError for a URL that cannot be one.
    """
    text = text or os.environ.get(VARIABLE) or DEFAULT
    if text.startswith(HUB):
        from loragraft.zoo.hub_place import HubPlace

        return HubPlace(text.removeprefix(HUB).strip("/"), public=public)
    from loragraft.zoo.file_place import open_files

    return open_files(text)


def check_no_source(target: str | Path, option: str) -> None:
    """Raises ZooError where `target` is a folder of Python sources: in a checkout `zoo` and `adapters` are Loragraft's own."""
    folder = Path(target).expanduser()
    if "://" not in str(target) and any(folder.glob("*.py")):
        name = folder.resolve().name
        raise ZooError(
            f"{target} holds Python sources, as the folders of a checkout do: give another one, such as {option}runs/{name}"
        )


def choose(place: Place, wanted: str) -> Listed:
    """`NAME` -> its newest version that is not yanked; `NAME@1.2.0` -> that one, yanked or not.

    Raises ZooError naming the nearest name or version.
    """
    name, _, version = wanted.partition("@")
    found = place.versions(name)
    if not found:
        names = place.names()
        if not names:
            hidden = ", or they are private and your token does not see them" if place.url.startswith(HUB) else ""
            raise ZooError(f"{place.url} holds no adapters{hidden}")
        raise ZooError(f"{place.url} has no adapter {name!r}. {did_you_mean(name, names)}")
    if version:
        for item in found:
            if item.entry.version == version:
                return item
        raise ZooError(
            f"{place.url} has no version {version!r} of {name!r}, but {', '.join(item.entry.version for item in found)}"
        )
    usable = [item for item in found if not item.status.yanked]
    if not usable:
        last = found[-1]
        raise ZooError(
            f"every version of {name!r} was yanked, the last one ({last.entry.version}) because: {last.status.yanked}. "
            f"If you want it all the same: {name}@{last.entry.version}"
        )
    return max(usable, key=lambda item: version_numbers(item.entry.version))


def did_you_mean(name: str, known: list[str]) -> str:
    """For an error message; without anything similar, the first few."""
    close = difflib.get_close_matches(name, known, n=1)
    return (
        f"Did you mean {close[0]!r}?" if close else f"It has: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
    )
