"""The best rank-R approximation of a matrix M [N, K], as factors L1 [N, R], L2 [R, K] with the singular values shared evenly.

`low_rank` is `torch.svd_lowrank`, from scratch. `Subspace` is the same randomized method (Halko, Martinsson and Tropp,
arXiv:0909.4061) for a sequence of matrices that differ little, as in the alternation of SVDQuant: each one starts from the
right singular vectors of the one before,

    Q = orth(M V),  B = Q^T M,  B B^T = P S^2 P^T,  L1 = Q P sqrt(S),  L2 = P^T B / sqrt(S),  V = B^T for the next

so one pass over M stands for one power iteration and the alternation itself does the rest. With an `InputMoment` G = C C^T of
the inputs the error counts as they meet it: what is wanted is the best approximation of M C, and that is Q Q^T M C with Q the
leading left singular vectors of M C. Neither C nor its inverse is needed, G alone is:

    Q = orth(M G V),  B = Q^T M,  B G B^T = P S^2 P^T,  L1 and L2 as before

`orth` is CholeskyQR2 with the Gram matrix in float64: tall products and a q x q inverse instead of Householder's column by
column, which a GPU does badly. Matrices may come as a stack [..., N, K]: a GPU takes as long for one as for ten.
"""

from functools import lru_cache

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 10, 4
"""q = R + 10 and niter = 4: DeepCompressor PR #111 (50x faster than the full SVD at the same image quality)."""
MOMENT_DAMPING = 1.0
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
    """Orthonormal columns with the same span, [..., N, q] in the input's dtype; a column of (almost) no weight becomes zero."""
    basis = matrix_Nq.double()
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    for _ in range(2):
        gram = basis.mT @ basis
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(GRAM_SHIFT * diagonal.sum(-1, keepdim=True) + torch.finfo(torch.float32).tiny)
        factor, _ = torch.linalg.cholesky_ex(gram)
        # The shift bounds the factor's condition by 1e7: its inverse is good to 1e-9, and the second pass mends that.
        basis = basis @ torch.linalg.solve_triangular(factor, identity, upper=False).mT
    return basis.to(matrix_Nq.dtype)


@lru_cache(maxsize=16)
def _start(K: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """N(0, 1) [K, q], drawn on the CPU: one start for every device. Not to be written to."""
    return torch.randn(K, columns, generator=torch.Generator().manual_seed(seed)).to(device)


class InputMoment:
    """G = x^T x / S + damping mean(diag) I of inputs x [S, K], applied without forming a K x K matrix.

    tr(M G M^T) is the squared output error |x M^T|^2 / S of an error M in the weight, plus a share of |M|^2 that stands for
    inputs other than the S rows.
    """

    def __init__(self, inputs_SK: Tensor, damping: float = MOMENT_DAMPING) -> None:
        self._inputs_SK = inputs_SK
        self._damp = damping * inputs_SK.square().mean().clamp(min=1e-30)

    def apply(self, columns_Kq: Tensor) -> Tensor:
        """G A."""
        x = self._inputs_SK
        return x.T @ (x @ columns_Kq) / len(x) + self._damp * columns_Kq


class Subspace:
    """Low-rank factors of one slowly changing matrix, or of a stack; remembers the right singular vectors of the last one."""

    def __init__(
        self,
        rank: int,
        seed: int,
        cold_iterations: int = POWER_ITERATIONS,
        moment: InputMoment | None = None,
    ) -> None:
        self.rank, self.seed, self.cold_iterations, self.moment = rank, seed, cold_iterations, moment
        self._last_qK: Tensor | None = None

    def factors(self, matrix_NK: Tensor) -> tuple[Tensor, Tensor]:
        """[..., N, R] and [..., R, K] of the matrix as it is now."""
        *stack, N, K = matrix_NK.shape
        rank = min(self.rank, N, K)
        if rank == 0:
            return matrix_NK.new_zeros(*stack, N, 0), matrix_NK.new_zeros(*stack, 0, K)
        left_Nq = self._left(matrix_NK)
        small_qK = left_Nq.mT @ matrix_NK
        wide_qK = small_qK.double()
        gram = wide_qK @ self._weighted(small_qK.mT).double()
        # The eigenvectors of a 42 x 42 matrix are LAPACK's in a fifth of the time that a GPU takes to start.
        values, vectors = torch.linalg.eigh(gram.cpu())
        values, vectors = values.flip(-1)[..., :rank].clamp(min=0), vectors.flip(-1)[..., :rank]
        root = values.sqrt().sqrt()[..., None, :]
        inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
        self._last_qK = small_qK
        return left_Nq @ (vectors * root).to(matrix_NK), (vectors * inverse).mT.to(matrix_NK) @ small_qK

    def _left(self, matrix_NK: Tensor) -> Tensor:
        """Q [..., N, q]."""
        if self._last_qK is not None:
            return orthonormal(matrix_NK @ self._weighted(orthonormal(self._last_qK.mT)))
        N, K = matrix_NK.shape[-2:]
        columns = min(min(self.rank, N, K) + OVERSAMPLING, N, K)
        right_Kq = _start(K, columns, self.seed, matrix_NK.device)
        for _ in range(self.cold_iterations):
            right_Kq = orthonormal(matrix_NK.mT @ orthonormal(matrix_NK @ self._weighted(right_Kq)))
        return orthonormal(matrix_NK @ self._weighted(right_Kq))

    def _weighted(self, columns_Kq: Tensor) -> Tensor:
        return columns_Kq if self.moment is None else self.moment.apply(columns_Kq)
