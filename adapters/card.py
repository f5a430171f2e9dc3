"""The card of an adapter: what it is, what it was trained on, how it did, how to load it. Markdown with a YAML header."""

from typing import Any

import yaml

from loragraft.adapters.checkpoint import Adapter


def adapter_card(adapter: Adapter, score: dict[str, Any] | None) -> str:
    """README.md text. `score` is the run's score.json, or None if none was measured."""
    about = adapter.metadata
    header = {
        "base_model": about["base"],
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "tags": ["lora", "template:sd-lora", "loragraft", "svdquant"],
        "loragraft": {key: about.get(key) for key in ("base_id", "profile", "recipe_hash", "data_fingerprint")},
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).rstrip(),
        "---",
        f"# {adapter.name}",
        "",
        f"A LoRA of rank {about['rank']} for `{about['base']}`, trained for {about['steps']} steps against its frozen "
        f"backbone in precision `{about['profile']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| base id | `{about['base_id']}` |",
        f"| recipe hash | `{about['recipe_hash']}` |",
        f"| data fingerprint | `{about['data_fingerprint']}` |",
        f"| validation loss | {_figure(about.get('validation_loss_start'))} before, "
        f"{_figure(about.get('validation_loss_end'))} after |",
    ]
    if score is not None:
        base, moved = score["kid_lite0_base"], score["kid_lite0_adapter"]
        lines += [
            f"| KID on Lite0 features, N = {score['images']}, {score['split']} split | {base['value']:.4f} base, "
            f"{moved['value']:.4f} with the adapter ({moved['low']:.4f} to {moved['high']:.4f}) |"
        ]
    prompts = about["recipe"]["sample"]["prompts"]
    if prompts:
        lines += ["", "Prompts that it was sampled with:", "", *(f"* {prompt}" for prompt in prompts)]
    lines += [
        "",
        "```bash",
        'loragraft generate --adapter . --prompt "..." --compare',
        "```",
        "",
        "The file is diffusers' own format: `pipeline.load_lora_weights(folder)` reads it on the 16-bit base.",
        "",
    ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
