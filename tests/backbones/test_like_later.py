"""What the first block of a class gets; that blocks then share compiled code is tested in test_compiled.py."""

import torch

from loragraft.backbones.like_later import LikeLater


def test_the_first_block_gets_what_later_ones_get():
    """By place or by name, as it was called; the text that every block reads is left alone."""
    block = torch.nn.Linear(2, 2)
    text, image = torch.randn(1, 3, 8).transpose(1, 2), torch.randn(1, 8, 2)

    class BasicTransformerBlock(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = block

        def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    module = BasicTransformerBlock()
    (x, y), kwargs = LikeLater(module)(module, (text, image), {})
    assert x.is_contiguous()
    assert torch.equal(x, text)
    assert (x.requires_grad, y is image, kwargs) == (True, True, {})
    args, kwargs = LikeLater(module)(module, (text,), {"encoder_hidden_states": image})
    assert len(args) == 1
    assert kwargs["encoder_hidden_states"] is image
    with torch.no_grad():
        ((x, _), _) = LikeLater(module)(module, (image, text), {})
    assert x is image
    x.requires_grad_()
    ((same, _), _) = LikeLater(module)(module, (image, text), {})
    assert same is image
