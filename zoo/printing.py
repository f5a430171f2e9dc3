"""Entries for a reader: one line each, or everything."""

from collections.abc import Sequence

from loragraft.disk import readable_bytes
from loragraft.zoo.entry import Entry, Listed


def print_table(items: Sequence[Listed], *, every: bool) -> None:
    """The newest version of each that is not yanked, or every version."""
    shown = list(items) if every else list({i.entry.name: i for i in items if not i.status.yanked}.values())
    for item in shown:
        entry = item.entry
        score = next(iter(entry.scores), None)
        figure = f"{score.metric} {score.base:.3f} -> {score.value:.3f} (N {score.n})" if score else "not scored"
        flags = "".join(f"  [{word}]" for word in (*(["signed"] if item.signed else []), *item.status.to_dict()))
        print(
            f"{entry.name:20s} {entry.version:8s} {entry.base.name} {entry.base.profile} ({entry.base.id[:8]}), rank {entry.rank}, "
            f"{readable_bytes(entry.size)}, {figure}{flags}"
        )


def describe(entry: Entry) -> str:
    """Everything that an entry says, in lines."""
    base = f"{entry.base.name}{f', {entry.base.repository}' if entry.base.repository else ''}, profile {entry.base.profile}"
    rows = {
        "base": base,
        "base id": entry.base.id,
        "rank": f"{entry.rank}, {entry.parameters:,} parameters, {entry.contract}",
        "domain": entry.domain,
        "trigger": entry.trigger,
        "licence": " ".join(filter(None, (entry.licence.id, entry.licence.name, entry.licence.link))),
        "recipe hash": entry.recipe_hash,
        "data": entry.data_fingerprint,
        "created": f"{entry.created}, {', '.join(f'{name} {number}' for name, number in entry.versions.items())}",
    }
    lines = [f"{entry.name} {entry.version}", *(f"  {key:15s} {value}" for key, value in rows.items() if value)]
    for score in entry.scores:
        spread = "" if score.low is None or score.high is None else f" ({score.low:.4f} to {score.high:.4f})"
        lines.append(
            f"  {score.metric}: base {score.base:.4f}, adapter {score.value:.4f}{spread}, {score.better} is better"
        )
    if entry.scores:
        score = entry.scores[0]
        lines.append(
            f"    {score.protocol}: N {score.n}, {score.references} references, split {score.split}, seed {score.seed}, {score.steps} steps, "
            f"guidance {score.guidance:g}; {score.hardware}"
        )
    lines += [
        f"  {record.sha256[:16]} {readable_bytes(record.size):>10s}  {name}" for name, record in entry.files.items()
    ]
    return "\n".join(lines)
