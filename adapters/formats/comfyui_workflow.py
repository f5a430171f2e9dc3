"""The smallest ComfyUI workflow that draws with an exported adapter, in ComfyUI's API format (drag the file onto its canvas).

Node -> {"class_type", "inputs"}; an input [node, i] is that node's i-th output. Names of models are those that ComfyUI's own
examples use; core nodes only.
"""

from typing import Any

from loragraft.adapters.checkpoint import Adapter

Workflow = dict[str, dict[str, Any]]
CHECKPOINTS = {
    "sdxl": ("sd_xl_base_1.0.safetensors", 1024, 30, 7.0),
    "sd2": ("v2-1_512-ema-pruned.safetensors", 512, 30, 7.0),
    "sd15": ("v1-5-pruned-emaonly.safetensors", 512, 30, 7.0),
}
"""Family -> checkpoint, edge in pixels, steps, guidance."""
PROMPT = "a photograph"


def workflow(adapter: Adapter, file_name: str) -> Workflow | None:
    """The workflow for `file_name` in ComfyUI's models/loras; None where ComfyUI does not know the base."""
    if not adapter.family.published:
        return None
    sample = (adapter.metadata.get("recipe") or {}).get("sample") or {}
    prompt = next(iter(sample.get("prompts") or ()), PROMPT)
    if adapter.family.name == "flux":
        return _flux(file_name, str(prompt), schnell=adapter.metadata.get("base") == "flux1-schnell")
    if adapter.family.name in CHECKPOINTS:
        return _checkpoint(
            file_name, str(prompt), str(sample.get("negative_prompt") or ""), *CHECKPOINTS[adapter.family.name]
        )
    return None


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _flux(file_name: str, prompt: str, schnell: bool) -> Workflow:
    nodes = {
        "model": _node(
            "UNETLoader", unet_name=f"flux1-{'schnell' if schnell else 'dev'}.safetensors", weight_dtype="default"
        ),
        "text": _node(
            "DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"
        ),
        "vae": _node("VAELoader", vae_name="ae.safetensors"),
        "prompt": _node("CLIPTextEncode", clip=["text", 0], text=prompt),
        "positive": _node("FluxGuidance", conditioning=["prompt", 0], guidance=3.5),
        "negative": _node("ConditioningZeroOut", conditioning=["prompt", 0]),
        "noise": _node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
    }
    return nodes | _drawn(file_name, ("model", 0), ("vae", 0), 4 if schnell else 20, 1.0, "simple")


def _checkpoint(
    file_name: str, prompt: str, negative: str, checkpoint: str, edge: int, steps: int, guidance: float
) -> Workflow:
    nodes = {
        "model": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": _node("CLIPTextEncode", clip=["model", 1], text=prompt),
        "negative": _node("CLIPTextEncode", clip=["model", 1], text=negative),
        "noise": _node("EmptyLatentImage", width=edge, height=edge, batch_size=1),
    }
    return nodes | _drawn(file_name, ("model", 0), ("model", 2), steps, guidance, "normal")


def _drawn(
    file_name: str, model: tuple[str, int], vae: tuple[str, int], steps: int, guidance: float, scheduler: str
) -> Workflow:
    sampler = _node(
        "KSampler",
        model=["lora", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["noise", 0],
        seed=0,
        steps=steps,
        cfg=guidance,
        sampler_name="euler",
        scheduler=scheduler,
        denoise=1.0,
    )
    return {
        "lora": _node("LoraLoaderModelOnly", model=list(model), lora_name=file_name, strength_model=1.0),
        "sampler": sampler,
        "image": _node("VAEDecode", samples=["sampler", 0], vae=list(vae)),
        "saved": _node("SaveImage", images=["image", 0], filename_prefix=file_name.removesuffix(".safetensors")),
    }
