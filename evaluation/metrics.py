"""Scores of images. Each function states its formula; none knows where the images came from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def kernel_distance(x_ND: Tensor, y_MD: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the cubic kernel, the KID formula.

        k(a, b) = (a . b / D + 1)^3
        KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    x [N, D], y [M, D], N and M at least 2; the expectation over draws does not depend on N or M. Can be slightly
    negative for equal distributions. Source: Binkowski et al., "Demystifying MMD GANs" (2018), section 4.
    """
    n, m = len(x_ND), len(y_MD)
    if n < 2 or m < 2:
        raise ValueError(f"the kernel distance needs at least two images on each side, got {n} and {m}")
    xx, yy, xy = _cubic(x_ND, x_ND), _cubic(y_MD, y_MD), _cubic(x_ND, y_MD)
    within_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def kernel_distance_interval(x_ND: Tensor, y_MD: Tensor, resamples: int = 500, seed: int = 0) -> Interval:
    """`kernel_distance` with a bootstrap interval over the generated side x (y is the fixed reference).

    Resampling with replacement puts copies of one image on the off-diagonal, which biases a U-statistic upwards;
    pairs of copies are therefore left out of the resampled within-x mean.
    """
    value = kernel_distance(x_ND, y_MD)
    n, m = len(x_ND), len(y_MD)
    xx, yy, xy = _cubic(x_ND, x_ND), _cubic(y_MD, y_MD), _cubic(x_ND, y_MD)
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    cross = xy.mean(1)

    def estimate(chosen: Tensor) -> float:
        distinct = chosen[:, None] != chosen[None, :]
        within_x = xx[chosen][:, chosen][distinct].mean()
        return float(within_x + within_y - 2 * cross[chosen].mean())

    return bootstrap(n, estimate, value, resamples, seed)


def bootstrap(n: int, estimate: Callable[[Tensor], float], value: float, resamples: int, seed: int) -> Interval:
    """Percentile interval of `estimate` over `resamples` draws of n indices with replacement (Efron, 1979)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.tensor([estimate(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)])
    low, high = torch.quantile(draws.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image: 10 log10(1 / mean (a - b)^2).

    a, b [B, ...] in [0, 1] -> [B]; equal images give infinity.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return torch.where(error == 0, math.inf, -10 * torch.log10(error))


def _cubic(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    return (a_ND @ b_MD.T / a_ND.shape[1] + 1) ** 3
