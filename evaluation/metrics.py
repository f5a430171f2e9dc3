"""Scores of images. Each function states its formula; none knows where the images came from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW = 11
"""Edge of the window of `ssim`, in pixels."""


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
    negative for equal distributions. Raises ValueError for fewer images. Source: Binkowski et al., "Demystifying MMD GANs" (2018),
    section 4.
    """
    n, m = len(x_ND), len(y_MD)
    if n < 2 or m < 2:
        raise ValueError(f"the kernel distance needs at least two images on each side, got {n} and {m}")
    xx, yy, xy = _cubic(x_ND, x_ND), _cubic(y_MD, y_MD), _cubic(x_ND, y_MD)
    within_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def kernel_distance_interval(x_ND: Tensor, y_MD: Tensor, resamples: int = 500, seed: int = 0) -> Interval:
    """`kernel_distance` with a bootstrap interval over both sides: the references are a finite draw as well.

    Resampling with replacement puts copies of one image on the off-diagonal, which biases a U-statistic upwards;
    pairs of copies are therefore left out of the resampled within-set means.
    """
    value = kernel_distance(x_ND, y_MD)
    weights_x, weights_y = _draws(len(x_ND), resamples, seed), _draws(len(y_MD), resamples, seed + 1)
    within = _resampled_within(_cubic(x_ND, x_ND), weights_x) + _resampled_within(_cubic(y_MD, y_MD), weights_y)
    return _percentiles(value, within - 2 * _resampled_cross(_cubic(x_ND, y_MD), weights_x, weights_y))


def kernel_distance_paired(x_ND: Tensor, y_ND: Tensor, resamples: int = 500, seed: int = 0) -> Interval:
    """`kernel_distance` of two sets that belong together image by image (one prompt, one seed), with its interval.

        mean_{i != j} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    x_i resembles y_i, so the pairs (i, i) stay out of the cross term, which they would pull below zero; equal sets give
    exactly 0. Draws take pairs. Raises ValueError for sets of different sizes and for fewer than two pairs. Source: Gretton et al.,
    "A Kernel Two-Sample Test" (2012), lemma 6.
    """
    if len(x_ND) != len(y_ND) or len(x_ND) < 2:
        raise ValueError(f"pairs need two sets of one size, at least two images, got {len(x_ND)} and {len(y_ND)}")
    cross = _cubic(x_ND, y_ND)
    kernel = _cubic(x_ND, x_ND) + _cubic(y_ND, y_ND) - cross - cross.T
    everything = torch.ones(1, len(x_ND), dtype=torch.float64)
    value = float(_resampled_within(kernel.double(), everything))
    return _percentiles(value, _resampled_within(kernel.double(), _draws(len(x_ND), resamples, seed)))


def kernel_distance_change(a_ND: Tensor, b_ND: Tensor, y_MD: Tensor, resamples: int = 500, seed: int = 0) -> Interval:
    """KID(b, y) - KID(a, y), where a_i and b_i belong together (one prompt, one seed): each draw takes both or neither.

    The interval of a difference is what tells two sets apart; overlapping intervals of the two values do not settle it.
    Raises ValueError for sets of different sizes, and as `kernel_distance`.
    """
    if len(a_ND) != len(b_ND):
        raise ValueError(f"the sets belong together image by image, but have {len(a_ND)} and {len(b_ND)}")
    weights, weights_y = _draws(len(a_ND), resamples, seed), _draws(len(y_MD), resamples, seed + 1)

    def moving_part(x_ND: Tensor) -> Tensor:
        cross = _resampled_cross(_cubic(x_ND, y_MD), weights, weights_y)
        return _resampled_within(_cubic(x_ND, x_ND), weights) - 2 * cross

    value = kernel_distance(b_ND, y_MD) - kernel_distance(a_ND, y_MD)
    return _percentiles(value, moving_part(b_ND) - moving_part(a_ND))


def frechet_distance(x_ND: Tensor, y_MD: Tensor) -> float:
    """Squared Frechet distance of two normal distributions fitted to the features, the FID formula, in float64.

        |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2),   tr (S_x S_y)^(1/2) = sum of singular values of A B^T

    with S_x = A^T A, S_y = B^T B the unbiased covariances: no matrix root, so that fewer images than features do no harm
    to the arithmetic. They do to the statistic: it falls as N grows, so compare at one N only. x [N, D], y [M, D].
    Raises ValueError for fewer than two images a side.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017); Dowson and Landau (1982).
    """
    if len(x_ND) < 2 or len(y_MD) < 2:
        raise ValueError(f"the Frechet distance needs at least two images on each side, got {len(x_ND)}, {len(y_MD)}")
    a, b = _covariance_factor(x_ND), _covariance_factor(y_MD)
    shift = (x_ND.double().mean(0) - y_MD.double().mean(0)).square().sum()
    distance = float(shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())
    return max(0.0, distance)  # equal sets: rounding alone is left


def frechet_distance_interval(x_ND: Tensor, y_MD: Tensor, groups: int = 10) -> Interval:
    """`frechet_distance` +- 1.96 standard errors by the delete-a-group jackknife over both sides.

        var = (g - 1) / g sum_i (F_-i - mean F_-i)^2,   F_-i without every g-th image from i; the sides' variances add

    A bootstrap would be wrong here: copies of images lower the rank of the covariance and raise the distance. The interval is
    of this N, biased as the value is; with fewer images than features up to twice too wide (measured on normal features); NaN
    with fewer than 4 images a side. Source: Kott, "Delete-a-group jackknife" (2001).
    """
    value = frechet_distance(x_ND, y_MD)
    if min(len(x_ND), len(y_MD)) < 4:
        return Interval(value, math.nan, math.nan)

    def variance(side_ND: Tensor, distance: Callable[[Tensor], float]) -> float:
        g = min(groups, len(side_ND))
        place = torch.arange(len(side_ND)) % g
        without = torch.tensor([distance(side_ND[place != i]) for i in range(g)], dtype=torch.float64)
        return float((g - 1) / g * (without - without.mean()).square().sum())

    spread = variance(x_ND, lambda x: frechet_distance(x, y_MD)) + variance(y_MD, lambda y: frechet_distance(x_ND, y))
    return Interval(value, value - 1.96 * math.sqrt(spread), value + 1.96 * math.sqrt(spread))


def recall_at_k(similarity_QG: Tensor, relevant_QG: Tensor, k: int) -> Tensor:
    """Per query 1.0 where one of the k most similar gallery items is relevant, else 0.0; [Q].

    The rank of the best relevant item is one plus the number of irrelevant items that are at least as similar: ties count
    against it, so that constant features score nothing.
    """
    best = similarity_QG.masked_fill(~relevant_QG, -math.inf).amax(1, keepdim=True)
    ahead = ((similarity_QG >= best) & ~relevant_QG).sum(1)
    return ((ahead < k) & relevant_QG.any(1)).double()


def chance_at_k(relevant_QG: Tensor, k: int) -> float:
    """Expected `recall_at_k` of a random order: mean over queries of 1 - C(G - r, k) / C(G, k), r relevant of G."""
    gallery = relevant_QG.shape[1]
    total = math.comb(gallery, min(k, gallery))
    missed = [math.comb(gallery - r, min(k, gallery)) / total for r in relevant_QG.sum(1).tolist()]
    return 1 - sum(missed) / len(missed)


def share_interval(hits_N: Tensor) -> Interval:
    """Share of ones among zeros and ones, with Wilson's 95 % interval.

        (p + z^2 / 2N +- z sqrt(p (1 - p) / N + z^2 / 4N^2)) / (1 + z^2 / N),   z = 1.96

    A bootstrap of 0 hits in N says that the interval is [0, 0]; this one says [0, 3.8 / N]. Source: Wilson (1927).
    """
    n, p, z = len(hits_N), float(hits_N.double().mean()), 1.959964
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return Interval(p, max(0.0, min(low, p)), min(1.0, max(high, p)))


def mean_interval(values_N: Tensor, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean over images with its bootstrap interval."""
    values = values_N.double()
    return _percentiles(float(values.mean()), _draws(len(values), resamples, seed) @ values / len(values))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image: 10 log10(1 / mean (a - b)^2).

    a, b [B, ...] in [0, 1] -> [B]; equal images give infinity.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return torch.where(error == 0, math.inf, -10 * torch.log10(error))


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Structural similarity per image, mean over channels and all places where the window fits; [B], 1 for equal images.

        (2 mu_a mu_b + c1) (2 cov_ab + c2) / ((mu_a^2 + mu_b^2 + c1) (var_a + var_b + c2)),   c1 = 0.01^2, c2 = 0.03^2

    with an 11 x 11 Gaussian window of deviation 1.5; a, b [B, C, H, W] in [0, 1], both edges at least 11, else ValueError.
    Source: Wang et al., "Image Quality Assessment" (2004). The definition of scikit-image's `structural_similarity`
    with `gaussian_weights=True, use_sample_covariance=False`, which the tests compare with where it is installed.
    """
    if min(a_BCHW.shape[-2:]) < WINDOW:
        raise ValueError(f"images of {tuple(a_BCHW.shape[-2:])} pixels are smaller than the window of {WINDOW}")
    a, b = a_BCHW.double().flatten(0, 1)[:, None], b_BCHW.double().flatten(0, 1)[:, None]
    axis = torch.arange(WINDOW, dtype=torch.float64, device=a.device) - WINDOW // 2
    line = torch.exp(-axis.square() / (2 * 1.5**2))
    line = line / line.sum()

    def blurred(x: Tensor) -> Tensor:
        return conv2d(conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mu_a, mu_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mu_a.square(), blurred(b * b) - mu_b.square()
    covariance = blurred(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mu_a * mu_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mu_a.square() + mu_b.square() + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(1).view(a_BCHW.shape[:2]).mean(1)


def _cubic(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    return (a_ND @ b_MD.T / a_ND.shape[1] + 1) ** 3


def _draws(n: int, resamples: int, seed: int) -> Tensor:
    """How often each of n items is in each of `resamples` draws with replacement (Efron, 1979); float64 [R, n]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(n, (resamples, n), generator=generator)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, chosen, torch.ones_like(chosen).double())


def _resampled_within(kernel_NN: Tensor, weights_RN: Tensor) -> Tensor:
    """Mean kernel over pairs of different images, in every draw; [R]."""
    same = weights_RN.square()
    pairs = weights_RN.sum(1).square() - same.sum(1)
    total = ((weights_RN @ kernel_NN) * weights_RN).sum(1) - same @ kernel_NN.diagonal()
    return torch.where(pairs > 0, total / pairs, math.nan)


def _resampled_cross(kernel_NM: Tensor, weights_RN: Tensor, weights_RM: Tensor) -> Tensor:
    return ((weights_RN @ kernel_NM) * weights_RM).sum(1) / kernel_NM.numel()


def _percentiles(value: float, estimates_R: Tensor) -> Interval:
    # NaN: a draw that took one image only has no pair
    low, high = torch.nanquantile(estimates_R.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def _covariance_factor(x_ND: Tensor) -> Tensor:
    """A [min(N, D), D] with A^T A the unbiased covariance."""
    centred = (x_ND.double() - x_ND.double().mean(0)) / math.sqrt(len(x_ND) - 1)
    return torch.linalg.qr(centred, mode="r").R if centred.shape[0] > centred.shape[1] else centred
