"""Two promises: a compensating adapter is for its own base, and portable once its start is taken off."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from loragraft.adapters.checkpoint import Adapter, load_adapter, write_adapter
from loragraft.adapters.formats.contract import START_NAME, contract_of
from loragraft.adapters.graft import graft, ungraft
from loragraft.adapters.resident import ResidentAdapters
from loragraft.adapters.truncation import truncate
from loragraft.cli import main
from loragraft.quantization.checkpoint import base_id, checksum

TO_Q = "transformer_blocks.0.attn.to_q"


def test_less_its_start_it_is_the_update(draw) -> None:
    """[B, -B0] [A; A0] = B A - B0 A0, rank 2 + 3; the metadata say so."""
    (down, up), (down0, up0) = (draw(2, 8), draw(6, 2)), (draw(3, 8), draw(6, 3))
    trained = Adapter("a", {"contract": "compensating", "rank": 2}, {"fc": (down, up)})
    found = trained.less(Adapter("start", {}, {"fc": (down0, up0)}))
    assert found.pairs["fc"][0].shape == (5, 8)
    torch.testing.assert_close(found.pairs["fc"][1] @ found.pairs["fc"][0], up @ down - up0 @ down0)
    assert (contract_of(found.metadata), found.metadata["rank"]) == ("portable", 5)


def test_another_adapters_start(draw) -> None:
    trained = Adapter("a", {}, {"fc": (draw(2, 8), draw(6, 2))})
    with pytest.raises(ValueError, match="only one of the two has 'fd'"):
        trained.less(Adapter("b", {}, {**trained.pairs, "fd": trained.pairs["fc"]}))
    with pytest.raises(ValueError, match="at 'fc' it has other shapes"):
        trained.less(Adapter("b", {}, {"fc": (draw(2, 4), draw(6, 2))}))
    with pytest.raises(ValueError, match="contract 'both'"):
        contract_of({"contract": "both"})


def test_a_compensating_adapter_is_grafted_on_its_own_base_only(
    flux: FluxTransformer2DModel, make_adapter: Callable[..., Adapter]
) -> None:
    """any_base does not help: it would add another base's error."""
    adapter = make_adapter("a", 0)
    own = replace(adapter, metadata={**adapter.metadata, "contract": "compensating", "base_id": base_id(flux)})
    foreign = replace(own, metadata={**own.metadata, "base_id": "6" * 64})
    with pytest.raises(ValueError, match=f"compensating.*{'6' * 64}.*make it portable"):
        graft(flux, foreign, any_base=True)
    graft(flux, own)


def test_two_compensating_adapters_do_not_go_together(
    flux: FluxTransformer2DModel, make_adapter: Callable[..., Adapter]
) -> None:
    """Grafted, active at once or joined: the base's error would be made up for twice. One beside portable ones is right."""
    one, two = (
        replace(made, metadata={**made.metadata, "contract": "compensating", "start_sha256": "0" * 64})
        for made in (make_adapter("one", 0), make_adapter("two", 1))
    )
    plain = make_adapter("plain", 2)
    joined = truncate([(plain, 1.0), (one, 1.0)], 4, "joined").adapter
    assert contract_of(joined.metadata) == "compensating" and "start_sha256" not in joined.metadata
    with pytest.raises(ValueError, match=r"'one' and 'two' are both compensating.*export FILE --portable"):
        truncate([(one, 1.0), (two, 1.0)], 4, "joined")
    graft(flux, one)
    graft(flux, plain)
    before = checksum(flux)
    with pytest.raises(ValueError, match="both compensating"):
        graft(flux, two)
    assert checksum(flux) == before
    ungraft(flux, "one")
    ungraft(flux, "plain")
    adapters = ResidentAdapters(flux)
    adapters.add(one)
    adapters.add(two, active=False)
    with pytest.raises(ValueError, match="both compensating"):
        adapters.activate("one", "two")
    assert adapters.active == {"one": 1.0}
    adapters.activate("two")
    with pytest.raises(ValueError, match="both compensating"):
        adapters.add(one, name="again")
    assert set(adapters.residents) == {"one", "two"}


def test_export_takes_the_start_off(draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the file beside it; without one the command says what it needs; --keep-contract leaves it as it is."""
    about = {"name": "mine", "base": "tiny", "base_id": "5" * 64, "contract": "compensating"}
    pair, start = (draw(2, 8), draw(6, 2)), (draw(2, 8), draw(6, 2))
    file = write_adapter({TO_Q: pair}, tmp_path / "trained", about)
    given = ["adapter", "export", str(file), "--style", "diffusers", "--out"]
    assert main([*given, str(tmp_path / "no")]) == 2
    assert "is compensating" in capsys.readouterr().err
    write_adapter({TO_Q: start}, tmp_path / "start", about).rename(file.with_name(START_NAME))
    assert main([*given, str(tmp_path / "portable")]) == 0
    portable = load_adapter(tmp_path / "portable")
    assert contract_of(portable.metadata) == "portable"
    down, up = portable.pairs[TO_Q]
    torch.testing.assert_close(up @ down, pair[1] @ pair[0] - start[1] @ start[0])
    assert main([*given, str(tmp_path / "kept"), "--keep-contract"]) == 0
    kept = load_adapter(tmp_path / "kept")
    assert contract_of(kept.metadata) == "compensating" and torch.equal(kept.pairs[TO_Q][0], pair[0])
    assert (
        main(["adapter", "export", str(tmp_path / "portable"), "--style", "kohya", "--start", str(file), "--out", "x"])
        == 2
    )
    assert "is portable already" in capsys.readouterr().err
