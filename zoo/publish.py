"""Publish a finished run: collect, sign, hand to a place."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from loragraft.zoo.contents import FIRST_VERSION, collect
from loragraft.zoo.entry import SIGNATURE, Entry
from loragraft.zoo.places import Place


@dataclass(frozen=True, kw_only=True)
class Published:
    """What `publish` did."""

    entry: Entry
    changed: bool
    """False: this very version was there already."""
    signed: bool


def publish(
    run: Path,
    place: Place | None,
    *,
    name: str | None = None,
    version: str = FIRST_VERSION,
    licence: str | None = None,
    pictures: Path | None = None,
    key: Path | None = None,
) -> Published:
    """Publishes `run` to `place`, which has the old or the new state at every moment; without a place, only checks that it could.

    key: a private key to sign with (`signing.sign`). Raises ZooError as `collect`, `sign` and the place do.
    """
    with tempfile.TemporaryDirectory(prefix="loragraft-publish-") as temporary:
        folder = Path(temporary)
        entry = collect(run, folder, name=name, version=version, licence=licence, pictures=pictures)
        if key is not None:
            from loragraft.zoo.signing import sign

            sign(folder, folder / SIGNATURE, key)
        changed = place.publish(entry, folder) if place is not None else False
        return Published(entry=entry, changed=changed, signed=key is not None)
