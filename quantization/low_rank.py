"""The best rank-R approximation of a matrix M [N, K], as factors L1 [N, R], L2 [R, K] with the singular values shared evenly.

`low_rank` is `torch.svd_lowrank`, from scratch. `Subspace` is the same randomized method (Halko, Martinsson and Tropp,
arXiv:0909.4061) for a sequence of matrices that differ little, as in the alternation of SVDQuant: each one starts from the
right singular vectors of the one before,

    Q = orth(M V),  B = Q^T M,  B B^T = P S^2 P^T,  L1 = Q P sqrt(S),  L2 = P^T B / sqrt(S),  V = B^T for the next

so one pass over M stands for one power iteration and the alternation itself does the rest. With an `InputMetric` C it
approximates M C instead, L2 becoming L2 C^-1: the error then counts as the inputs meet it. `orth` is CholeskyQR2 with the Gram
matrix in float64: two tall products instead of Householder's column by column, which a GPU does badly.
"""

from functools import lru_cache

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 10, 4
"""q = R + 10 and niter = 4: DeepCompressor PR #111 (50x faster than the full SVD at the same image quality)."""
METRIC_DAMPING = 1.0
"""On `pocket`'s activations 1.0 has a lower error on unseen rows than 0.03, 0.1 or 0.3; on inputs without structure more is better."""
GRAM_SHIFT = 1e-13
"""Share of the trace added to a Gram matrix, so that a matrix of lower rank than q has a Cholesky factor too."""


def low_rank(matrix_NK: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Best rank-R factors [N, R], [R, K] of a matrix, singular values shared evenly; the global RNG is left alone."""
    N, K = matrix_NK.shape
    rank = min(rank, N, K)
    if rank == 0:
        return matrix_NK.new_zeros(N, 0), matrix_NK.new_zeros(0, K)
    devices = [matrix_NK.device] if matrix_NK.is_cuda else []
    with torch.random.fork_rng(devices=devices):  # svd_lowrank takes no generator of its own
        if matrix_NK.is_cuda:
            torch.cuda.default_generators[matrix_NK.device.index].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix_NK, q=min(rank + OVERSAMPLING, N, K), niter=POWER_ITERATIONS)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, (V[:, :rank] * root).T


def orthonormal(matrix_Nq: Tensor) -> Tensor:
    """Orthonormal columns with the same span, [N, q] in the input's dtype; a column of (almost) no weight becomes zero."""
    basis = matrix_Nq.double()
    for _ in range(2):
        gram = basis.T @ basis
        gram.diagonal().add_(GRAM_SHIFT * gram.diagonal().sum() + torch.finfo(torch.float32).tiny)
        factor, _ = torch.linalg.cholesky_ex(gram)
        basis = torch.linalg.solve_triangular(factor, basis.T, upper=False).T
    return basis.to(matrix_Nq.dtype)


@lru_cache(maxsize=16)
def _start(K: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """N(0, 1) [K, q], drawn on the CPU: one start for every device. Not to be written to."""
    return torch.randn(K, columns, generator=torch.Generator().manual_seed(seed)).to(device)


class InputMetric:
    """C = (x^T x / S + damping mean(diag) I)^(1/2) of inputs x [S, K], applied without forming a K x K matrix.

    |M C| is the output error |x M^T| / sqrt(S) of an error M in the weight, plus a share of |M| that stands for inputs other
    than the S rows. With x^T x / S = V diag(v) V^T and the damping term d: C = sqrt(d) I + V diag(sqrt(v + d) - sqrt(d)) V^T.
    """

    def __init__(self, inputs_SK: Tensor, damping: float = METRIC_DAMPING) -> None:
        S, K = inputs_SK.shape
        wide = inputs_SK.double()
        # The S x S Gram matrix has the same spectrum, and K may be 15360.
        values, vectors = torch.linalg.eigh(wide @ wide.T / S)
        kept = values > 1e-10 * values[-1].clamp(min=1e-30)
        values, vectors = values[kept], vectors[:, kept]
        damp = damping * values.sum().clamp(min=1e-30) / K
        self._basis_KS = (wide.T @ vectors / (S * values).sqrt()).to(inputs_SK.dtype)
        wide_root = (values + damp).sqrt()
        self._root, self._stretch = damp.sqrt().item(), (wide_root - damp.sqrt()).to(inputs_SK.dtype)
        self._shrink = (1 / wide_root - 1 / damp.sqrt()).to(inputs_SK.dtype)

    def apply(self, rows_qK: Tensor) -> Tensor:
        """A C."""
        return self._root * rows_qK + (rows_qK @ self._basis_KS * self._stretch) @ self._basis_KS.T

    def undo(self, rows_qK: Tensor) -> Tensor:
        """A C^-1."""
        return rows_qK / self._root + (rows_qK @ self._basis_KS * self._shrink) @ self._basis_KS.T


class Subspace:
    """Low-rank factors of one slowly changing matrix; remembers the right singular vectors of the last one."""

    def __init__(
        self,
        rank: int,
        seed: int,
        cold_iterations: int = POWER_ITERATIONS,
        metric: InputMetric | None = None,
    ) -> None:
        self.rank, self.seed, self.cold_iterations, self.metric = rank, seed, cold_iterations, metric
        self._right: Tensor | None = None

    def factors(self, matrix_NK: Tensor) -> tuple[Tensor, Tensor]:
        """[N, R] and [R, K] of the matrix as it is now."""
        N, K = matrix_NK.shape
        rank = min(self.rank, N, K)
        if rank == 0:
            return matrix_NK.new_zeros(N, 0), matrix_NK.new_zeros(0, K)
        right_Kq, iterations = self._right, 0
        if right_Kq is None:
            columns = min(rank + OVERSAMPLING, N, K)
            right_Kq, iterations = _start(K, columns, self.seed, matrix_NK.device), self.cold_iterations
        for _ in range(iterations):
            right_Kq = orthonormal(self._weighted(matrix_NK.T @ orthonormal(matrix_NK @ self._weighted(right_Kq))))
        left_Nq = orthonormal(matrix_NK @ self._weighted(right_Kq))
        small_qK = self._weighted((left_Nq.T @ matrix_NK).T).T
        # The eigenvectors of a 42 x 42 matrix are LAPACK's in a fifth of the time that a GPU takes to start.
        values, vectors = torch.linalg.eigh((small_qK.double() @ small_qK.double().T).cpu())
        values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
        root = values.sqrt().sqrt()
        inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
        self._right = orthonormal(small_qK.T)
        up_NR = left_Nq @ (vectors * root).to(matrix_NK)
        right_RK = (vectors * inverse).T.to(matrix_NK) @ small_qK
        return up_NR, right_RK if self.metric is None else self.metric.undo(right_RK)

    def _weighted(self, columns_Kq: Tensor) -> Tensor:
        return columns_Kq if self.metric is None else self.metric.apply(columns_Kq.T).T
