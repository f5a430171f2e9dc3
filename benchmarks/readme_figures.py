"""The README's figures, from the committed JSON files: prints the block between the two `figures` markers.

    python benchmarks/readme_figures.py          # print
    python benchmarks/readme_figures.py --write  # put into README.md

`tests/test_readme.py` compares the two.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- figures: benchmarks/readme_figures.py -->\n", "<!-- end of figures -->"


def figures() -> str:
    """Markdown."""
    return (
        "\n".join([*_main_job(_read("main_job")), "", *_graft(_read("graft")), "", *_gpu(_read("pocket_gpu"))]) + "\n"
    )


def with_figures(readme: str) -> str:
    """The README's text with the block renewed."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return head + START + figures() + END + tail


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def _main_job(result: dict[str, Any]) -> list[str]:
    seconds, score = result["seconds"], result["score"]
    base, moved = score["kid_lite0_base"], score["kid_lite0_adapter"]
    return [
        f"**The main job** ({result['device']}, commit {result['commit']}): {result['steps']} steps in "
        f"{seconds['optimizer_loop'] / 60:.1f} minutes; drawing the data set, encoding, training, drawing the grid and scoring "
        f"together {seconds['all'] / 60:.1f} minutes. Validation loss {result['validation_loss_start']:.3f} before, "
        f"{result['validation_loss_end']:.3f} after.",
        "",
        f"| distance to held-out domain images (KID on EfficientNet-Lite0 features, N = {score['images']} against "
        f"{score['references']}; not comparable with Inception KID) | | 95 % interval |",
        "|---|---|---|",
        f"| base | {base['value']:.3f} | {base['low']:.3f} to {base['high']:.3f} |",
        f"| base + adapter | {moved['value']:.3f} | {moved['low']:.3f} to {moved['high']:.3f} |",
        f"| floor: one half of the held-out images against the other | {score['kid_lite0_floor']:.4f} | |",
        *_retrieval(score),
    ]


def _retrieval(score: dict[str, Any]) -> list[str]:
    """Rows of a score that has them: older results know only the kernel distance."""
    if "retrieval" not in score:
        return []
    name = "retrieval_minilm_lite0_r5"
    rows = [
        ("base", score["sets"]["base"]),
        ("base + adapter", score["sets"]["adapter"]),
        ("real images", score["floors"]),
    ]
    about = f"caption finds its image among {score['retrieval']['gallery']}, first five (chance {score['retrieval']['chance']:.2f})"
    found = ((label, entry[name]) for label, entry in rows)
    return [
        f"| {about}: {label} | {entry['value']:.2f} | {entry['low']:.2f} to {entry['high']:.2f} |"
        for label, entry in found
    ]


def _graft(result: dict[str, Any]) -> list[str]:
    return [
        f"**The graft** (trained `marketing` adapter, {len(result['layers'])} layers on their real inputs, commit "
        f"{result['commit']}): it changes the predicted velocity by {100 * result['velocity_change']:.0f} %. Worst layer, "
        f"grafted against the adapter kept apart, same bf16 factors: {result['fp32_worst']:.1e} in float32, "
        f"{result['bf16_worst']:.1e} in bf16; against float64 in bf16 {result['bf16_grafted_vs_float64_worst']:.1e} grafted, "
        f"{result['bf16_apart_vs_float64_worst']:.1e} apart. Taking it off restores every byte: "
        f"{'yes' if result['undo_restores_every_byte'] else 'NO'}.",
    ]


def _counts(layers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in layers.items())


def _gpu(result: dict[str, Any]) -> list[str]:
    rows = [
        f"| {profile} | {_counts(figures['layers'])} | {', '.join(figures['backends'])} | {figures['gradient_cosine_min']:.4f} | "
        f"{figures['step_ms']:.0f} |"
        for profile, figures in result["profiles"].items()
    ]
    return [
        f"**On a GPU** ({result['device']}, torch {result['versions']['torch']}, Triton {result['versions']['triton']}, commit "
        f"{result['commit']}): `pocket`, batch {result['batch']}, one training step. Correct, and not yet fast: bf16 with PEFT's "
        f"LoRA, eager, takes {result['step_ms_bf16_peft_eager']:.0f} ms.",
        "",
        "| profile | layers | ran on | worst cosine of an adapter gradient to the float32 CPU reference | ms per step |",
        "|---|---|---|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(with_figures(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(figures(), end="")
