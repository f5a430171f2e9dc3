"""The parts of the page that are text: status line, figures, notes. Everything from outside is escaped."""

from collections import Counter
from collections.abc import Sequence
from html import escape

from loragraft.demo.engine import Loaded, Order, Picture
from loragraft.demo.figures import Memory

WORDS = {"native": "INT4, native (W4A8)", "interchange": "INT4, interchange (W4A4)", "16bit": "16-bit"}
"""Precision -> what the picker calls it."""

HEADER = """
<header><h1>Loragraft</h1>
<p>Adapters trained on the 4-bit model that ships, grafted into it, exactly. Everything here runs on this machine.</p></header>
"""


def idle(text: str) -> str:
    """A calm status line."""
    return f'<div class="status">{escape(text)}</div>'


def working(text: str, share: float | None = None) -> str:
    """A status line over a bar: `share` of it in [0, 1], or moving to and fro where nobody knows."""
    bar = '<i class="unknown"></i>' if share is None else f'<i style="width:{100 * share:.1f}%"></i>'
    return f'<div class="status" role="status">{escape(text)}<div class="bar">{bar}</div></div>'


def failed(text: str) -> str:
    """What went wrong, and stays in sight until the next press."""
    return f'<div class="status error" role="alert">{escape(text)}</div>'


def problems(found: Sequence[str]) -> str:
    """Adapters that could not be read."""
    return "".join(f'<div class="note">{escape(problem)}</div>' for problem in found)


def summary(order: Order, pictures: Sequence[Picture]) -> str:
    """One line when all is drawn."""
    first = pictures[0].seconds
    seconds = first.text + (first.start or 0) + sum(p.seconds.own for p in pictures)
    return f"Done in {seconds:.1f} s, seed {order.settings.seed}."


def figures(loaded: Loaded, used: Memory, adapters_mib: float, pictures: Sequence[Picture]) -> str:
    """Seconds per part and picture, then model, memory and layers."""
    return f'<div class="figures">{_seconds(pictures)}{_model(loaded, used, adapters_mib)}</div>'


def _seconds(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return '<p class="hint">Seconds for each part appear here after the first picture.</p>'
    shared = pictures[0].seconds
    rows = [("Text encoding", [f"{shared.text:.2f}"] + ["shared"] * (len(pictures) - 1))]
    if shared.start is not None:
        rows.append(("Start picture", [f"{shared.start:.2f}"] + ["shared"] * (len(pictures) - 1)))
    if any(p.adapted for p in pictures):
        rows.append(("Adapters in", [f"{p.seconds.adapters:.3f}" if p.adapted else "" for p in pictures]))
    rows.append(("Transformer", [f"{p.seconds.steps:.2f}" for p in pictures]))
    rows.append(("Decoding", [f"{p.seconds.decoding:.2f}" for p in pictures]))
    own = [p.seconds.total - (0 if i == 0 else shared.text + (shared.start or 0)) for i, p in enumerate(pictures)]
    rows.append(("Total", [f"{total:.2f}" for total in own]))
    rows.append(("Steps", [f"{p.steps}" + (" × 2 passes" if p.passes == 2 else "") for p in pictures]))
    head = "".join(f"<th>{'with adapters' if p.adapted else 'base'}</th>" for p in pictures)
    body = "".join(f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows)
    return f'<table id="seconds"><thead><tr><th>seconds</th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _model(loaded: Loaded, used: Memory, adapters_mib: float) -> str:
    backbone, size = loaded.backbone, loaded.size
    weights = f"{size.full:.1f} MiB" if size.int4 is None else f"{size.int4:.1f} MiB in INT4, {size.full:.1f} in 16-bit"
    memory = f"{used.resident:.0f} MiB, peak {used.peak_resident:.0f}"
    counts = Counter((row.numerics, row.backend) for row in backbone.ledger.rows)
    layers = ", ".join(f"{count} {numerics} ({backend})" for (numerics, backend), count in counts.items())
    rows = [
        ("Base", f"{backbone.spec.name}, {WORDS[loaded.precision]}"),
        ("Base id", f'<code title="{escape(backbone.base_id)}">{escape(backbone.base_id[:16])}</code>'),
        ("Transformer", weights),
        *([("Adapters", f"{adapters_mib:.2f} MiB in 16-bit")] if adapters_mib else []),
        *([("Resident", escape(", ".join(loaded.adapters.resident)))] if loaded.adapters.resident else []),
        ("Process", memory),
        *([("GPU peak", f"{used.peak_cuda:.0f} MiB")] if used.peak_cuda is not None else []),
        ("Layers", layers),
    ]
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<dl id="model">{body}</dl>'
