"""`sdxl`: Stable Diffusion XL 1.0, the base model without its refiner."""

from loragraft.backbones.stable_diffusion import unet_spec

SPEC = unet_spec("sdxl", resolution=1024, guidance=5.0, steps=30)
