"""The card of an adapter: what it is, what it was trained on, how it did, how to load it. Markdown with a YAML header.

The header is what the Hub reads: `base_model` (the 16-bit base, so that its page lists the adapter) with `base_model_relation`,
licence, gallery (`widget`, `template:sd-lora`), `model-index`. The quantized base, by name and hash, is in our own block `loragraft`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from loragraft.zoo.entry import Entry, Score
from loragraft.zoo.scores import TITLES

TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora", "loragraft", "svdquant")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One of the gallery."""

    file: str
    """Its name in the published folder."""
    prompt: str
    settings: Mapping[str, Any]


def adapter_card(
    entry: Entry, about: Mapping[str, Any], gallery: Sequence[Picture] = (), samples: str | None = None
) -> str:
    """README.md text. `about`: the adapter's metadata; `gallery`: pictures that are published beside it; `samples`: a sheet of them."""
    return "\n".join(["---", card_data(entry, gallery).to_yaml(), "---", *_body(entry, about, gallery, samples), ""])


def card_data(entry: Entry, gallery: Sequence[Picture] = ()) -> ModelCardData:
    """The header."""
    optional: dict[str, Any] = {
        "license_name": entry.licence.name or None,
        "license_link": entry.licence.link or None,
        "instance_prompt": entry.trigger or None,
        "widget": [{"text": picture.prompt, "output": {"url": picture.file}} for picture in gallery] or None,
    }
    if entry.scores:
        optional |= {"model_name": entry.name, "eval_results": [_eval_result(entry, score) for score in entry.scores]}
    return ModelCardData(
        base_model=entry.base.repository or entry.base.name,
        base_model_relation="adapter",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=entry.licence.id,
        tags=[*TAGS, *([entry.domain] if entry.domain else [])],
        loragraft={
            "name": entry.name,
            "version": entry.version,
            "base": entry.base.name,
            "base_id": entry.base.id,
            "profile": entry.base.profile,
            "contract": entry.contract,
            "recipe_hash": entry.recipe_hash,
            "data_fingerprint": entry.data_fingerprint,
        },
        **{key: value for key, value in optional.items() if value is not None},
    )


def _eval_result(entry: Entry, score: Score) -> EvalResult:
    data = entry.domain or entry.name
    return EvalResult(
        task_type="text-to-image",
        dataset_type=data,
        dataset_name=f"{data}, held-out captions",
        dataset_split=score.split,
        dataset_args={"fingerprint": entry.data_fingerprint},
        metric_type=score.metric,
        metric_name=TITLES.get(score.metric, score.metric),
        metric_value=round(score.value, 6),
        metric_args={
            "protocol": score.protocol,
            "n": score.n,
            "references": score.references,
            "seed": score.seed,
            "base": round(score.base, 6),
        },
    )


def _body(entry: Entry, about: Mapping[str, Any], gallery: Sequence[Picture], samples: str | None) -> list[str]:
    base = f"[{entry.base.repository}](https://huggingface.co/{entry.base.repository})" if entry.base.repository else ""
    lines = [
        f"# {entry.name} {entry.version}",
        "",
        f"A LoRA of rank {entry.rank} ({entry.parameters:,} parameters) for {base or f'`{entry.base.name}`'}, trained for "
        f"{about.get('steps', 'an unknown number of')} steps against its frozen backbone in precision "
        f"`{entry.base.profile}`.",
        "",
        "| | |",
        "|---|---|",
        f"| base id | `{entry.base.id}` |",
        f"| contract | {CONTRACTS[entry.contract]} |",
        f"| recipe hash | `{entry.recipe_hash}` |",
        f"| data fingerprint | `{entry.data_fingerprint}` |",
        f"| licence | {_licence(entry)} |",
        f"| validation loss | {_figure(about.get('validation_loss_start'))} before, "
        f"{_figure(about.get('validation_loss_end'))} after |",
    ]
    if entry.trigger:
        lines.append(f"| trigger | `{entry.trigger}` |")
    if gallery:
        settings = gallery[0].settings
        lines += ["", "<Gallery />", "", f"The pictures: {settings['steps']} steps, guidance {settings['guidance']:g}."]
    if samples is not None:
        lines += ["", "Drawn at the end of training:", "", f"![samples]({samples})"]
    if entry.scores:
        lines += ["", *_score_table(entry.scores)]
    prompts = about.get("recipe", {}).get("sample", {}).get("prompts", [])
    if prompts:
        lines += ["", "Prompts that it was sampled with:", "", *(f"* {prompt}" for prompt in prompts)]
    return [
        *lines,
        "",
        "```bash",
        'loragraft generate --adapter . --prompt "..." --compare --out ../drawn',
        "```",
        "",
        READING[entry.contract],
    ]


CONTRACTS = {
    "portable": "portable: valid on the quantized and on the 16-bit base",
    "compensating": "compensating: it also makes good for this quantized base's error, and is wrong on any other",
}


READING = {
    "portable": "The file is diffusers' own format: `pipeline.load_lora_weights(folder)` reads it on the 16-bit base.",
    "compensating": "For any other base, the 16-bit one and ComfyUI included, write the portable file first: "
    "`loragraft adapter export . --portable --style diffusers --out portable`.",
}
"""Contract -> how other programs read the weights."""


def _score_table(scores: Sequence[Score]) -> list[str]:
    first = scores[0]
    return [
        f"| protocol `{first.protocol}` | base | with the adapter | |",
        "|---|---|---|---|",
        *(
            f"| {TITLES.get(score.metric, score.metric)} | {score.base:.4f} | {score.value:.4f}{_interval(score)} | "
            f"{score.better} is better |"
            for score in scores
        ),
        "",
        f"N = {first.n} images per set against {first.references} held-out ones ({first.split} split), {first.steps} steps, guidance "
        f"{first.guidance:g}, seeds from {first.seed}; {first.hardware}. `loragraft zoo bench` measures them again.",
    ]


def _interval(score: Score) -> str:
    return "" if score.low is None or score.high is None else f" ({score.low:.4f} to {score.high:.4f})"


def _licence(entry: Entry) -> str:
    name = entry.licence.name or entry.licence.id
    return f"[{name}]({entry.licence.link}), the base's" if entry.licence.link else name


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
