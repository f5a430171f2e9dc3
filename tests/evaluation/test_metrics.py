"""Scores against closed forms and brute force."""

import math

import pytest
import torch

from loragraft.evaluation.metrics import kernel_distance, kernel_distance_interval, psnr


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
