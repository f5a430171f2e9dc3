"""The factors of a branch, joined with an adapter's and alone."""

import torch

from loragraft.kernels.branch import join


def test_a_branch_without_an_adapter_is_read_where_it_lies():
    """A copy would be a launch for each factor of every layer: a quarter of what the branch costs FLUX.1."""
    down = torch.randn(8, 96)
    assert join(down, None, 0, down.dtype) is down
    rounded = join(down, None, 0, torch.bfloat16)
    assert torch.equal(rounded, down.to(torch.bfloat16))


def test_joined_factors_lie_in_one_piece():
    down, adapter = torch.randn(96, 8).T, torch.randn(4, 96)
    joined = join(down, adapter, 0, torch.float32)
    assert joined.is_contiguous()
    assert torch.equal(joined, torch.cat((down, adapter)))
    assert join(down, None, 0, torch.float32).is_contiguous()
