"""The warm-started subspace: as good as the full SVD, robust to degenerate matrices, and its input moment is what it says."""

import pytest
import torch
from torch import Tensor

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.low_rank import InputMoment, Subspace, orthonormal


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
def test_moment_is_damped(S: int) -> None:
    x = _decaying(S, 40, seed=5)
    moment = (x.double().T @ x.double()) / S
    expected = moment + 0.5 * moment.diagonal().mean() * torch.eye(40)
    assert relative_rms(InputMoment(x, damping=0.5).apply(torch.eye(40)), expected) < 1e-6


def test_a_stack_is_its_matrices_one_by_one() -> None:
    stack = torch.stack([_decaying(seed=seed) for seed in range(3)])
    x = _decaying(300, 128, seed=9)
    for moment in (None, InputMoment(x)):
        together, alone = Subspace(8, 0, moment=moment), [Subspace(8, 0, moment=moment) for _ in stack]
        for _ in range(2):  # cold and warm
            up, right = together.factors(stack)
            for found, subspace, matrix in zip(up @ right, alone, stack, strict=True):
                up_alone, right_alone = subspace.factors(matrix)
                assert relative_rms(found, up_alone @ right_alone) < 1e-4
    assert [tuple(t.shape) for t in Subspace(0, 0).factors(stack)] == [(3, 96, 0), (3, 0, 128)]


def test_a_branch_in_the_metric_has_the_least_output_error() -> None:
    matrix, x = _decaying(), _decaying(300, 128, seed=9)
    x[:, :4] *= 20
    plain = Subspace(8, 0).factors(matrix)
    fitted = Subspace(8, 0, moment=InputMoment(x, damping=1e-3)).factors(matrix)

    def error(factors: tuple[Tensor, Tensor]) -> float:
        return relative_rms(x @ (factors[0] @ factors[1]).T, x @ matrix.T)

    # The least possible: project the outputs themselves.
    least = relative_rms(_best(x @ matrix.T, 8), x @ matrix.T)
    assert least <= error(fitted) < 1.02 * least
    assert error(fitted) < 0.9 * error(plain)


def test_a_branch_in_the_metric_is_the_svd_in_that_metric() -> None:
    """Against M C's own SVD with C the symmetric root, un-done by its inverse; loud inputs make C badly conditioned."""
    matrix, x = _decaying(), torch.randn(300, 128, generator=torch.Generator().manual_seed(1))
    x[:, :4] *= 30
    moment = x.double().T @ x.double() / len(x)
    moment += moment.diagonal().mean() * torch.eye(128)
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * values.sqrt()) @ vectors.T
    U, S, Vh = torch.linalg.svd(matrix.double() @ root)
    expected = (U[:, :8] * S[:8]) @ Vh[:8]
    up, right = Subspace(8, 0, moment=InputMoment(x)).factors(matrix)
    whole = matrix.double() @ root
    assert relative_rms(up @ right @ root.float(), whole) <= 1.001 * relative_rms(expected, whole)
