"""`sdxl-turbo`: SDXL distilled to 1 to 4 steps at 512 px. For drawing; adapters come from `sdxl`."""

from loragraft.backbones.stable_diffusion import unet_spec

SPEC = unet_spec(
    "sdxl-turbo",
    resolution=512,
    guidance=1.0,
    guidance_kind="none",
    steps=4,
    refuses_training=(
        "sdxl-turbo is distilled adversarially to 4 steps, and a step on the noise-prediction loss pulls it back to what needs 30. Train "
        "on base=sdxl, whose layers have the same names and shapes, and draw with sdxl-turbo: loragraft generate --adapter RUN --base "
        "sdxl-turbo --any-base"
    ),
)
