"""LoKr, LoHa and differences as factors: exact while the rank allows it, else the best there is with its error."""

import pytest
import torch
from torch import Tensor

from loragraft.adapters.formats.factors import Factors, expand


def product(found: Factors) -> Tensor:
    return found.up.flatten(1).double() @ found.down.flatten(1).double()


def close(found: Factors, matrix: Tensor) -> bool:
    return bool((product(found) - matrix.double()).norm() < 1e-6 * matrix.double().norm())


def test_lokr_of_two_divided_factors(draw) -> None:
    """r = 2 of both, alpha = 6: scale 3 (LyCORIS divides by the rank of W2)."""
    a1, b1, a2, b2 = draw(4, 2), draw(2, 3), draw(5, 2), draw(2, 7)
    parts = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2, "alpha": torch.tensor(6.0)}
    found = expand(parts, None)
    assert (found.down.shape, found.up.shape, found.error) == ((4, 21), (20, 4), 0.0)
    assert close(found, 3 * torch.kron(a1 @ b1, a2 @ b2))


def test_lokr_of_undivided_factors_has_no_scale(draw) -> None:
    w1, w2 = draw(2, 3), draw(5, 4)
    found = expand({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(100.0)}, None)
    assert found.down.shape[0] == 2 * 4
    assert close(found, torch.kron(w1, w2))


def test_lokr_of_convolutions(draw) -> None:
    w1, w2 = draw(2, 3), draw(5, 4, 3, 3)
    found = expand({"lokr_w1": w1, "lokr_w2": w2}, None)
    assert found.down.shape[1:] == (12, 3, 3) and found.up.shape[2:] == (1, 1)
    assert close(found, torch.kron(w1[:, :, None, None], w2).flatten(1))
    t2, a, b = draw(2, 2, 3, 3), draw(2, 5), draw(2, 4)  # Tucker: a is [r, N], as LyCORIS stores it
    tucker = expand({"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}, None)
    w2 = torch.einsum("ijkl,jr,ip->prkl", t2, b, a).contiguous()
    assert close(tucker, 0.5 * torch.kron(w1[:, :, None, None], w2).flatten(1))


def test_loha(draw) -> None:
    a1, b1, a2, b2 = draw(6, 2), draw(2, 5), draw(6, 2), draw(2, 5)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    found = expand(parts, None)
    assert found.down.shape == (4, 5)
    assert close(found, 0.5 * (a1 @ b1) * (a2 @ b2))
    t1, t2 = draw(2, 2, 3, 3), draw(2, 2, 3, 3)
    tucker = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": a1.T, "hada_w1_b": b1, "hada_w2_a": a2.T, "hada_w2_b": b2}
    m1, m2 = (torch.einsum("ijkl,jr,ip->prkl", t, b, a.T) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    found = expand(tucker, None)
    assert found.down.shape == (4, 5, 3, 3)
    assert close(found, (m1 * m2).flatten(1))


@pytest.mark.parametrize("kind", ["lokr", "loha", "diff"])
def test_a_rank_too_large_is_cut_to_the_best(draw, kind: str) -> None:
    """The error is that of the best approximation of this rank (Eckart-Young), and is what is reported."""
    if kind == "lokr":
        w1, w2 = draw(3, 3), draw(6, 6)
        parts, matrix = {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)
    elif kind == "loha":
        factors = [draw(12, 3), draw(3, 10), draw(12, 3), draw(3, 10)]
        parts = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), factors, strict=True))
        matrix = (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    else:
        matrix = draw(12, 10)
        parts = {"diff": matrix}
    found = expand(parts, None, max_rank=4)
    spectrum = torch.linalg.svdvals(matrix.double())
    best = spectrum[4:].norm() / spectrum.norm()
    actual = (product(found) - matrix.double()).norm() / matrix.double().norm()
    assert found.down.shape[0] == 4
    assert found.error == pytest.approx(float(actual), rel=1e-4)
    assert found.error == pytest.approx(float(best), rel=1e-3)


def test_shapes_that_do_not_fit(draw) -> None:
    with pytest.raises(ValueError, match=r"lokr_w2_a \(5, 2\) and lokr_w2_b \(3, 4\) do not fit"):
        expand({"lokr_w1": draw(2, 2), "lokr_w2_a": draw(5, 2), "lokr_w2_b": draw(3, 4)}, None)
    with pytest.raises(ValueError, match="lacks hada_w2_b"):
        expand({"hada_w1_a": draw(4, 2), "hada_w1_b": draw(2, 4), "hada_w2_a": draw(4, 2)}, None)
    with pytest.raises(ValueError, match="alpha has 2 values"):
        expand({"down": draw(2, 4), "up": draw(4, 2), "alpha": torch.ones(2)}, None)


def test_rank_0_is_not_called_two_ranks_that_differ() -> None:
    with pytest.raises(ValueError, match="rank 0 changes nothing"):
        expand({"down": torch.ones(0, 8), "up": torch.ones(8, 0)}, None)
