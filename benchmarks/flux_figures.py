"""`benchmarks/results/flux_training.json` from the parts that `flux_training.py`, `whole_run.py` and `multi_gpu.py` leave in a folder."""

import json
from pathlib import Path
from typing import Any


def collect(parts: Path, fidelity: Path | None, preflight: Path | None = None) -> dict[str, Any]:
    """The report's keys from the parts that are there, `multi_gpu.py`'s among them; a figure whose parts are missing is null.

    fidelity, preflight: the files of the benchmarks of that name."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(parts.glob("*.json"))}

    def ratio(above: str, below: str, key: str = "step_ms") -> float | None:
        return found[above][key] / found[below][key] if above in found and below in found else None

    def figure(name: str, key: str) -> float | None:
        return found[name][key] if name in found else None

    def given(file: Path | None, key: str) -> float | None:
        return None if file is None else json.loads(file.read_text())[key]

    def held_share() -> float | None:
        """The most that a process keeps of a base divided between two."""
        return max(found["fsdp"]["held_gib"]) / found["fsdp"]["held_gib_whole"] if "fsdp" in found else None

    return {
        "device": sorted({part["device"] for part in found.values()}),
        "versions": next((part["versions"] for part in found.values()), None),
        "commit": sorted({part["commit"] for part in found.values()}),
        "command": "python benchmarks/flux_training.py all --parts PARTS --out OUT --commit COMMIT",
        "step_1024_vs_eager": ratio("bf16_eager_1024", "ours_1024"),
        "step_1024_vs_compiled": ratio("bf16_compiled_1024", "ours_1024"),
        "step_1024_vs_compiled_same_attention": ratio("bf16_compiled_1024_same_attention", "ours_1024"),
        "step_1024_vs_fp8": ratio("fp8_compiled_1024", "ours_1024"),
        "step_1024_vs_nf4": ratio("nf4_eager_1024", "ours_1024"),
        "step_1024_vs_sdnq": ratio("sdnq_eager_1024", "ours_1024"),
        "step_512_vs_eager": ratio("bf16_eager_512", "ours_512"),
        "step_512_vs_compiled": ratio("bf16_compiled_512", "ours_512"),
        "peak_gib_ckpt_1024": figure("ours_1024_ckpt", "peak_gib"),
        "peak_gib_ckpt_1024_offload": figure("ours_1024_ckpt_offload", "peak_gib"),
        "step_1024_ckpt_offload_vs_ckpt": ratio("ours_1024_ckpt_offload", "ours_1024_ckpt"),
        "peak_gib_nockpt_1024": figure("ours_1024", "peak_gib"),
        "first_step_seconds": figure("ours_1024", "first_step_seconds"),
        "image_20_steps_vs_bf16": ratio("bf16_image", "ours_image", "image_20_steps_seconds"),
        "image_20_steps_vs_fp8": ratio("fp8_image", "ours_image", "image_20_steps_seconds"),
        "image_20_steps_vs_nf4": ratio("nf4_image", "ours_image", "image_20_steps_seconds"),
        "image_memory_vs_bf16": ratio("ours_image", "bf16_image", "transformer_gib"),
        "reserved_gib_whole_run_1024": figure("whole_run_1024", "reserved_gib"),
        "reserved_gib_whole_run_512": figure("whole_run_512", "reserved_gib"),
        "preflight_worst_pct": given(preflight, "preflight_worst_pct"),
        "grad_cosine_min": given(fidelity, "grad_cosine_min"),
        "ddp2_scaling": figure("ddp_2", "ddp2_scaling"),
        "gpu_idle_share": figure("idle", "idle_share"),
        "fsdp_held_share": held_share(),
        "keep_all": {
            "step_1024_vs_eager": ratio("bf16_eager_1024", "ours_1024_keep_all"),
            "step_1024_vs_compiled": ratio("bf16_compiled_1024", "ours_1024_keep_all"),
            "step_1024_vs_compiled_same_attention": ratio("bf16_compiled_1024_same_attention", "ours_1024_keep_all"),
            "peak_gib_nockpt_1024": figure("ours_1024_keep_all", "peak_gib"),
        },
        "loss_worst_pct": _loss_difference(found),
        "parts": found,
    }


def _loss_difference(found: dict[str, Any]) -> float | None:
    """Largest difference of a step's loss from bf16's, in per cent."""
    if "bf16_compiled_1024" not in found or "ours_1024" not in found:
        return None
    pairs = zip(found["ours_1024"]["losses"], found["bf16_compiled_1024"]["losses"], strict=True)
    return 100 * max(abs(ours - theirs) / theirs for ours, theirs in pairs)
