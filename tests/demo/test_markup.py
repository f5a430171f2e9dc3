"""The figures under the pictures: a column each, and what stays resident."""

from loragraft.demo import markup
from loragraft.demo.engine import Engine, Order
from loragraft.demo.figures import Memory
from loragraft.evaluation.generate import Settings

USED = Memory(resident=1, peak_resident=2, peak_cuda=None)


def test_the_exchange_of_adapters_is_timed_and_the_resident_are_named(engine: Engine) -> None:
    settings = Settings(prompt="a red star", steps=1, guidance=1.0)
    alone = list(engine.draw(Order(settings=settings), lambda *_: None))
    assert engine.loaded is not None
    engine.loaded.adapters.clear()
    shown = markup.figures(engine.loaded, USED, 0, alone)
    assert "Adapters in" not in shown and "Resident" not in shown
    for label in ("ours", "second"):
        order = Order(settings=settings, adapters=((label, 1.0),))
        pictures = list(engine.draw(order, lambda *_: None))
    shown = markup.figures(engine.loaded, USED, 0.5, pictures)
    seconds = pictures[1].seconds.adapters
    assert f"<tr><td>Adapters in</td><td></td><td>{seconds:.3f}</td></tr>" in shown
    assert "<dt>Resident</dt><dd>ours, second</dd>" in shown
    engine.loaded.adapters.clear()
