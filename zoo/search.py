"""Which entries somebody means."""

from collections.abc import Sequence

from loragraft.zoo.entry import Entry


def matches(entry: Entry, words: Sequence[str], base: str | None = None, domain: str | None = None) -> bool:
    """Every word occurs in name, domain, trigger, base or licence, whatever its case; base and domain are met as a whole."""
    parts = (entry.name, entry.domain, entry.trigger, entry.base.name, entry.base.repository or "", entry.licence.id)
    text = " ".join(parts).casefold()
    return (
        all(word.casefold() in text for word in words)
        and (base is None or base in (entry.base.name, entry.base.repository))
        and (domain is None or domain == entry.domain)
    )
