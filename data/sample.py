"""One image and what is known about it: what every source gives and everything after it reads."""

from dataclasses import dataclass
from pathlib import Path

from loragraft.data.splits import Split

Shape = tuple[int, int]
"""(H, W) in pixels."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and what is known about it."""

    image: Path
    caption: str
    split: Split
    concept: str
    licence: str
    short: str = ""
    """The caption as a lazy person would type it; empty where the data set has none."""
    captions: tuple[str, ...] = ()
    """All that training says of the image, `caption` first; empty = `caption` alone."""
    digest: bytes = b""
    """sha256 of the image's bytes where it is known already: an image of a stream, whose file is gone once encoded."""
    size: tuple[int, int] | None = None
    """(width, height) as it is seen, where it is known already."""

    @property
    def said(self) -> tuple[str, ...]:
        """Every caption that it is shown with; at least one."""
        return self.captions or (self.caption,)
