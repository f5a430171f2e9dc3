"""The best rank-R approximation of a matrix M [N, K], as factors L1 [N, R], L2 [R, K] with the singular values shared evenly.

`low_rank` is `torch.svd_lowrank`, from scratch. `Subspace` is the same randomized method (Halko, Martinsson and Tropp,
arXiv:0909.4061) for a sequence of matrices that differ little, as in the alternation of SVDQuant: each one starts from the
right singular vectors of the one before,

    Q = orth(M V),  B = Q^T M,  B B^T = P S^2 P^T,  L1 = Q P sqrt(S),  L2 = P^T B / sqrt(S),  V = B^T for the next

so one pass over M stands for one power iteration and the alternation itself does the rest. `orth` is CholeskyQR2 with the Gram
matrix in float64: two tall products instead of Householder's column by column, which a GPU does badly.
"""

from functools import lru_cache

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 10, 4
"""q = R + 10 and niter = 4: DeepCompressor PR #111 (50x faster than the full SVD at the same image quality)."""
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


class Subspace:
    """Low-rank factors of one slowly changing matrix; remembers the right singular vectors of the last one."""

    def __init__(self, rank: int, seed: int, cold_iterations: int = POWER_ITERATIONS) -> None:
        self.rank, self.seed, self.cold_iterations = rank, seed, cold_iterations
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
            right_Kq = orthonormal(matrix_NK.T @ orthonormal(matrix_NK @ right_Kq))
        left_Nq = orthonormal(matrix_NK @ right_Kq)
        small_qK = left_Nq.T @ matrix_NK
        # The eigenvectors of a 42 x 42 matrix are LAPACK's in a fifth of the time that a GPU takes to start.
        values, vectors = torch.linalg.eigh((small_qK.double() @ small_qK.double().T).cpu())
        values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
        root = values.sqrt().sqrt()
        inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
        self._right = orthonormal(small_qK.T)
        up_NR = left_Nq @ (vectors * root).to(matrix_NK)
        return up_NR, (vectors * inverse).T.to(matrix_NK) @ small_qK
