"""The warm-started subspace: as good as the full SVD, robust to degenerate matrices, and its metric is what it says."""

import pytest
import torch
from torch import Tensor

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.low_rank import InputMetric, Subspace, orthonormal


def _decaying(N: int = 96, K: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.diag(0.9 ** torch.arange(64.0))
    return torch.randn(N, 64, generator=generator) @ middle @ torch.randn(64, K, generator=generator)


def _best(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).float()


def test_cold_and_warm_match_the_full_svd() -> None:
    matrix = _decaying()
    subspace = Subspace(8, seed=0)
    for step in range(4):  # each a little further, as in the alternation
        matrix = matrix + 0.05 * step * _decaying(seed=step)
        up, right = subspace.factors(matrix)
        assert up.shape == (96, 8) and right.shape == (8, 128)
        assert relative_rms(up @ right, matrix) <= 1.005 * relative_rms(_best(matrix, 8), matrix)
        torch.testing.assert_close(up.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=0)  # shared evenly


def test_loud_columns_do_not_break_the_orthonormal_basis() -> None:
    matrix = _decaying()
    matrix[:, 3] *= 1e4
    basis = orthonormal(matrix[:, :40])
    torch.testing.assert_close(basis.T @ basis, torch.eye(40), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["zero", "rank one", "tiny"])
def test_degenerate_matrices_give_finite_factors(case: str) -> None:
    matrix = torch.zeros(20, 30)
    if case != "zero":
        matrix = torch.outer(torch.arange(20.0), torch.ones(30)) * (1e-20 if case == "tiny" else 1)
    up, right = Subspace(6, seed=0).factors(matrix)
    assert torch.isfinite(up).all() and torch.isfinite(right).all()
    torch.testing.assert_close(up @ right, matrix, rtol=1e-4, atol=1e-24)


def test_rank_zero_and_rank_above_the_matrix() -> None:
    matrix = _decaying(5, 9)
    assert [tuple(t.shape) for t in Subspace(0, 0).factors(matrix)] == [(5, 0), (0, 9)]
    up, right = Subspace(32, 0).factors(matrix)
    assert up.shape == (5, 5)
    assert relative_rms(up @ right, matrix) < 1e-5


def test_same_seed_same_bits_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    first = Subspace(8, seed=3).factors(_decaying())
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    again = Subspace(8, seed=3).factors(_decaying())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("S", [16, 200])
def test_metric_is_the_root_of_the_damped_second_moment(S: int) -> None:
    x = _decaying(S, 40, seed=5)
    metric = InputMetric(x, damping=0.5)
    C = metric.apply(torch.eye(40)).double()
    moment = (x.double().T @ x.double()) / S
    expected = moment + 0.5 * moment.diagonal().mean() * torch.eye(40)
    assert relative_rms(C @ C, expected) < 1e-5
    assert relative_rms(metric.undo(metric.apply(x)), x) < 1e-5


def test_a_branch_in_the_metric_has_the_least_output_error() -> None:
    matrix, x = _decaying(), _decaying(300, 128, seed=9)
    x[:, :4] *= 20
    plain = Subspace(8, 0).factors(matrix)
    fitted = Subspace(8, 0, metric=InputMetric(x, damping=1e-3)).factors(matrix)

    def error(factors: tuple[Tensor, Tensor]) -> float:
        return relative_rms(x @ (factors[0] @ factors[1]).T, x @ matrix.T)

    # The least possible: project the outputs themselves.
    least = relative_rms(_best(x @ matrix.T, 8), x @ matrix.T)
    assert least <= error(fitted) < 1.02 * least
    assert error(fitted) < 0.9 * error(plain)
