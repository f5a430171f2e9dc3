"""Scores against closed forms and brute force."""

import math

import pytest
import torch

from loragraft.evaluation.metrics import (
    Interval,
    chance_at_k,
    frechet_distance,
    frechet_distance_interval,
    kernel_distance,
    kernel_distance_change,
    kernel_distance_interval,
    kernel_distance_paired,
    mean_interval,
    psnr,
    recall_at_k,
    share_interval,
    ssim,
)


def brute_force(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return xx + yy - 2 * xy


def test_kernel_distance_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(9, 5, generator=generator, dtype=torch.float64) + 1
    assert kernel_distance(x, y) == pytest.approx(brute_force(x, y), rel=1e-12)


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(shift: float) -> torch.Tensor:
        return torch.randn(60, 16, generator=generator, dtype=torch.float64) + shift

    same = torch.tensor([kernel_distance(draw(0), draw(0)) for _ in range(200)])
    assert abs(float(same.mean())) < 3 * float(same.std()) / math.sqrt(200)
    assert kernel_distance(draw(0), draw(0.5)) > 10 * float(same.std())


def test_the_interval_holds_the_value_and_shrinks_with_n() -> None:
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    few = torch.randn(20, 16, generator=generator, dtype=torch.float64) + 0.3
    many = torch.randn(320, 16, generator=generator, dtype=torch.float64) + 0.3
    a, b = kernel_distance_interval(few, y), kernel_distance_interval(many, y)
    for interval in (a, b):
        assert interval.low < interval.value < interval.high
    assert b.high - b.low < 0.5 * (a.high - a.low)


def test_kernel_distance_needs_two_images() -> None:
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(torch.zeros(1, 4), torch.zeros(5, 4))


def test_psnr_closed_form() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[0] += 0.1
    values = psnr(a, b)
    assert values[0] == pytest.approx(20.0)
    assert math.isinf(values[1])


def test_paired_kernel_distance_is_zero_for_equal_sets_and_its_formula_otherwise() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    assert kernel_distance_paired(x, x) == Interval(0.0, 0.0, 0.0)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / len(pairs)
    assert kernel_distance_paired(x, y).value == pytest.approx(expected, rel=1e-10)


def test_the_change_of_the_kernel_distance_is_a_difference_and_tells_small_steps_apart() -> None:
    """Pairing takes out what both sets share: the interval of the change is far narrower than those of the values."""
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(80, 16, generator=generator, dtype=torch.float64)
    a = torch.randn(80, 16, generator=generator, dtype=torch.float64) + 1.0
    b = a - 0.1
    change = kernel_distance_change(a, b, y)
    assert change.value == pytest.approx(kernel_distance(b, y) - kernel_distance(a, y))
    assert change.high < 0
    before, after = kernel_distance_interval(a, y), kernel_distance_interval(b, y)
    assert before.low < after.high, "the two intervals overlap"
    with pytest.raises(ValueError, match="image by image"):
        kernel_distance_change(a, b[:5], y)


def test_frechet_distance_closed_forms() -> None:
    """Equal sets: 0. A shift by d: |d|^2. Scaling by s about the mean: (s - 1)^2 tr S. More images than features, and fewer."""
    generator = torch.Generator().manual_seed(5)
    for n in (40, 6):
        x = torch.randn(n, 10, generator=generator, dtype=torch.float64)
        shift = torch.arange(10, dtype=torch.float64)
        centred = x - x.mean(0)
        trace = float(centred.square().sum() / (n - 1))
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)
        assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * trace, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(50, 5, generator=generator, dtype=torch.float64) * 2 + 1
    product = torch.cov(x.T) @ torch.cov(y.T)
    root = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_recall_counts_ranks_and_ties_count_against() -> None:
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    own = torch.eye(3, dtype=torch.bool)
    assert recall_at_k(similarity, own, 1).tolist() == [1, 0, 0]
    assert recall_at_k(similarity, own, 2).tolist() == [1, 1, 0]
    assert recall_at_k(torch.zeros(3, 3), own, 2).tolist() == [0, 0, 0], "constant features find nothing"
    either = own | own.roll(1, 1)
    assert recall_at_k(similarity, either, 1).tolist() == [1, 0, 1], "any relevant item will do"


def test_chance_is_what_a_random_order_scores() -> None:
    assert chance_at_k(torch.eye(20, dtype=torch.bool), 5) == pytest.approx(5 / 20)
    pairs = torch.eye(10, dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
    generator = torch.Generator().manual_seed(7)
    drawn = [recall_at_k(torch.rand(20, 20, generator=generator), pairs, 5).mean() for _ in range(400)]
    assert chance_at_k(pairs, 5) == pytest.approx(float(torch.stack(drawn).mean()), abs=0.01)


def test_wilson_interval_of_no_hits_is_not_empty() -> None:
    none, half = share_interval(torch.zeros(100)), share_interval(torch.tensor([1.0, 0.0] * 50))
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.03699, abs=1e-4)
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_mean_interval_has_the_width_of_the_standard_error() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(8))
    found = mean_interval(values)
    assert found.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)


def test_ssim_closed_forms() -> None:
    """Equal images: 1. Two constant images: (2 a b + c1) / (a^2 + b^2 + c1), as nothing varies. Not scale dependent in B."""
    generator = torch.Generator().manual_seed(9)
    picture = torch.rand(2, 3, 24, 20, generator=generator)
    assert ssim(picture, picture).tolist() == pytest.approx([1, 1])
    dark, light = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.7)
    assert float(ssim(dark, light)) == pytest.approx((2 * 0.14 + 1e-4) / (0.04 + 0.49 + 1e-4), rel=1e-6)
    assert float(ssim(picture[:1], 1 - picture[:1])) < 0
    with pytest.raises(ValueError, match="window of 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_ssim_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    generator = torch.Generator().manual_seed(10)
    a = torch.rand(1, 3, 32, 40, generator=generator, dtype=torch.float64)
    b = (a + 0.2 * torch.randn(1, 3, 32, 40, generator=generator, dtype=torch.float64)).clamp(0, 1)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    per_channel = [
        metrics.structural_similarity(x.numpy(), y.numpy(), **options) for x, y in zip(a[0], b[0], strict=True)
    ]
    assert float(ssim(a, b)) == pytest.approx(sum(per_channel) / 3, rel=1e-6)


def test_frechet_distance_of_two_gaussians() -> None:
    """Closed form: samples made to have exactly mean m and covariance diag(s^2) are |m|^2 + sum (s_i - t_i)^2 apart."""
    generator = torch.Generator().manual_seed(9)
    s, t, mean = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.0]), torch.tensor([1.0, -2.0, 0.5])

    def exact(n: int) -> torch.Tensor:
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        x = x - x.mean(0)
        return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T

    expected = float(mean.square().sum() + (s - t).square().sum())
    assert frechet_distance(exact(50) * s, exact(70) * t + mean) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_frechet_distance_agrees_with_scipy(scale: float) -> None:
    """The formula as published, with scipy's matrix root; features far apart in size, and float32 ones."""
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(10)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = (torch.randn(60, 12, generator=generator, dtype=torch.float64) @ mix) * scale
    y = (torch.randn(90, 12, generator=generator, dtype=torch.float64) @ mix.T + 2) * scale
    root = linalg.sqrtm((torch.cov(x.T) @ torch.cov(y.T)).numpy()).real
    trace = float(torch.cov(x.T).trace() + torch.cov(y.T).trace()) - 2 * float(root.trace())
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(expected, rel=1e-4)


def test_the_frechet_interval_has_the_spread_of_fresh_draws() -> None:
    generator = torch.Generator().manual_seed(11)

    def draw() -> Interval:
        x = torch.randn(120, 4, generator=generator, dtype=torch.float64)
        return frechet_distance_interval(x, torch.randn(150, 4, generator=generator, dtype=torch.float64) + 1)

    found = [draw() for _ in range(60)]
    deviation = float(torch.tensor([interval.value for interval in found]).std())
    estimated = sum((interval.high - interval.low) / (2 * 1.96) for interval in found) / len(found)
    assert 0.7 * deviation < estimated < 1.4 * deviation
    few = frechet_distance_interval(torch.rand(3, 4), torch.rand(9, 4))
    assert math.isnan(few.low) and math.isfinite(few.value)
