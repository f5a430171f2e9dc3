"""Stable Diffusion's UNets by rule: every layer that a LoRA can sit on, its weight's shape, and its name in the LDM code.

| LDM (kohya's SDXL files, ComfyUI) | diffusers |
|---|---|
| input_blocks.{1 + 3 i + j}.0, .1 | down_blocks.i.resnets.j, attentions.j |
| input_blocks.{3 i + 3}.0.op | down_blocks.i.downsamplers.0.conv |
| middle_block.0, .1, .2 | mid_block.resnets.0, attentions.0, resnets.1 |
| output_blocks.{3 i + j}.0, .1 | up_blocks.i.resnets.j, attentions.j |
| output_blocks.{3 i + 2}.1 or .2.conv, behind what is there | up_blocks.i.upsamplers.0.conv |
| in_layers.2, emb_layers.1, out_layers.3, skip_connection | conv1, time_emb_proj, conv2, conv_shortcut |

Sizes: the published configurations of stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0. The table is
checked against the model that diffusers builds from them, name by name and shape by shape, in the tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

Shape = tuple[int, ...]
LAYERS_PER_BLOCK = 2
RESNET_LDM = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP_LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class UNet:
    """What tells one published UNet from another."""

    channels: tuple[int, ...]
    """Of each down block; the up blocks go the other way."""
    depths: tuple[int, ...]
    """Transformer blocks in each attention of a down block; 0 = a block without attention."""
    text: int
    """Width of the text embeddings."""
    linear_projection: bool
    """proj_in and proj_out are linears, not 1x1 convolutions."""
    addition: int = 0
    """Inputs of SDXL's added conditions; 0 = none."""

    @cached_property
    def layers(self) -> dict[str, Shape]:
        """diffusers' path -> shape of the weight, [N, K] or [N, C, kh, kw], in the order of the modules there."""
        return dict(self._layers())

    def ldm_names(self) -> dict[str, str]:
        """diffusers' path -> LDM's."""
        return {path: _ldm_name(path, self.depths) for path in self.layers}

    def _layers(self) -> Iterator[tuple[str, Shape]]:
        first, last = self.channels[0], self.channels[-1]
        wide = 4 * first
        yield "conv_in", (first, 4, 3, 3)
        yield from _embedding("time_embedding", first, wide)
        if self.addition:
            yield from _embedding("add_embedding", self.addition, wide)
        for i, (before, here) in enumerate(pairwise((first, *self.channels))):
            inputs = [before] + [here] * (LAYERS_PER_BLOCK - 1)
            yield from self._block(f"down_blocks.{i}", inputs, here, self.depths[i])
            if i < len(self.channels) - 1:
                yield f"down_blocks.{i}.downsamplers.0.conv", (here, here, 3, 3)
        upwards = self.channels[::-1]
        for i, (before, here) in enumerate(pairwise((last, *upwards))):
            skipped = upwards[min(i + 1, len(upwards) - 1)]
            inputs = [before + here] + [here + here] * (LAYERS_PER_BLOCK - 1) + [here + skipped]
            yield from self._block(f"up_blocks.{i}", inputs, here, self.depths[::-1][i])
            if i < len(self.channels) - 1:
                yield f"up_blocks.{i}.upsamplers.0.conv", (here, here, 3, 3)
        yield from self._attention("mid_block.attentions.0", last, max(self.depths[-1], self.depths[-2]))
        for j in range(2):
            yield from self._resnet(f"mid_block.resnets.{j}", last, last)
        yield "conv_out", (4, first, 3, 3)

    def _block(self, path: str, inputs: list[int], width: int, depth: int) -> Iterator[tuple[str, Shape]]:
        for j in range(len(inputs) if depth else 0):
            yield from self._attention(f"{path}.attentions.{j}", width, depth)
        for j, size in enumerate(inputs):
            yield from self._resnet(f"{path}.resnets.{j}", size, width)

    def _resnet(self, path: str, inputs: int, width: int) -> Iterator[tuple[str, Shape]]:
        yield f"{path}.conv1", (width, inputs, 3, 3)
        yield f"{path}.time_emb_proj", (width, 4 * self.channels[0])
        yield f"{path}.conv2", (width, width, 3, 3)
        if inputs != width:
            yield f"{path}.conv_shortcut", (width, inputs, 1, 1)

    def _attention(self, path: str, width: int, depth: int) -> Iterator[tuple[str, Shape]]:
        square: Shape = (width, width) if self.linear_projection else (width, width, 1, 1)
        yield f"{path}.proj_in", square
        for d in range(depth):
            block = f"{path}.transformer_blocks.{d}"
            for name, inputs in (("attn1", width), ("attn2", self.text)):
                yield f"{block}.{name}.to_q", (width, width)
                yield f"{block}.{name}.to_k", (width, inputs)
                yield f"{block}.{name}.to_v", (width, inputs)
                yield f"{block}.{name}.to_out.0", (width, width)
            yield f"{block}.ff.net.0.proj", (8 * width, width)  # GEGLU: values and gates
            yield f"{block}.ff.net.2", (width, 4 * width)
        yield f"{path}.proj_out", square


def _embedding(path: str, inputs: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.linear_1", (width, inputs)
    yield f"{path}.linear_2", (width, width)


def _ldm_name(path: str, depths: tuple[int, ...]) -> str:
    if path in TOP_LDM:
        return TOP_LDM[path]
    parts = path.split(".")
    if parts[0] == "mid_block":
        place = f"middle_block.{1 if parts[1] == 'attentions' else 2 * int(parts[2])}"
        kind, rest = parts[1], parts[3:]
    else:
        i, kind, j, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        side, start = ("input_blocks", 1) if parts[0] == "down_blocks" else ("output_blocks", 0)
        if kind == "downsamplers":
            return f"{side}.{3 * i + 3}.0.op"
        if kind == "upsamplers":
            return f"{side}.{3 * i + 2}.{2 if depths[::-1][i] else 1}.conv"
        place = f"{side}.{start + 3 * i + j}.{1 if kind == 'attentions' else 0}"
    name = ".".join(rest)
    return f"{place}.{RESNET_LDM[name] if kind == 'resnets' else name}"


SD15 = UNet((320, 640, 1280, 1280), (1, 1, 1, 0), text=768, linear_projection=False)
SD2 = UNet((320, 640, 1280, 1280), (1, 1, 1, 0), text=1024, linear_projection=True)
SDXL = UNet((320, 640, 1280), (0, 2, 10), text=2048, linear_projection=True, addition=2816)
