"""A measured score as files: `score.json`, `score.csv`, `score.md`, `grid.png` and `nearest.png`.

The verdict lines state a comparison together with what it rests on, and say "no" or "not measured" as plainly as "yes".
"""

import csv
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from loragraft.data.images import png_bytes
from loragraft.disk import write_atomic
from loragraft.evaluation import standard_report
from loragraft.evaluation.measure import read_image, reference_reader
from loragraft.evaluation.score import WRONG, Measured, ScorePlan

CHANGED_DATA = "Images, captions or splits have changed since training: held-out images may have been trained on."
COLUMNS, PAIRS = 8, 8
GAP, MARGIN, HEAD = 6, 96, 62
R5 = "retrieval_minilm_lite0_r5"
LABELS = {
    "base": "base",
    "adapter": "base + adapter",
    "base-short": "base, short prompts",
    "adapter-short": "base + adapter, short prompts",
    "untrained": "base + untrained adapter",
}


def write_report(plan: ScorePlan, measured: Measured, folder: Path, resolution: int, context: Mapping[str, Any]) -> str:
    """Writes everything into `folder` and the JSON beside it as well; returns the Markdown.

    `context`: base, base id, versions, device, whether the data is that of training: what the measurement itself does not know.
    """
    result = {**measured.result, **context}
    result["verdicts"] = verdicts(result)
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    content = (json.dumps(result, indent=1) + "\n").encode()
    write_atomic(folder / "score.md", (text + "\n").encode())
    write_atomic(folder / "score.csv", _csv(result).encode())
    write_atomic(folder / "grid.png", png_bytes(picture_grid(plan, measured, resolution)))
    if measured.memory is not None:
        write_atomic(folder / "nearest.png", png_bytes(nearest_pairs(plan, measured, resolution)))
    write_atomic(folder / "score.json", content)
    write_atomic(folder.parent / "score.json", content)
    return text


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    """One sentence per question; every one names the numbers that decide it."""
    sets, base, moved = result["sets"], result["sets"]["base"], result["sets"]["adapter"]
    a, b = base["kid_lite0"], moved["kid_lite0"]
    overlap = "yes" if b["high"] >= a["low"] and a["high"] >= b["low"] else "no"
    # a share of a distance that is itself not above zero means nothing
    fall = f"{'falls' if b['value'] < a['value'] else 'RISES'} by {abs(1 - b['value'] / a['value']):.0%}"
    said = fall if a["value"] > 0 else "changes (a share is meaningless: the base's own is not above 0)"
    real, got, chance = result["floors"][R5]["value"], moved[R5]["value"], result["retrieval"]["chance"]
    lines = {"data": CHANGED_DATA} if result.get("same_data") is False else {}
    lines |= {
        "kid": f"KID {said}, from {a['value']:.4f} to {b['value']:.4f} (real images: {result['kid_lite0_floor']:.4f}); "
        f"95 % intervals overlap: {overlap}.",
        "retrieval": f"Recall at 5 is {base[R5]['value']:.2f} before, {got:.2f} after, {real:.2f} for the real images, "
        f"{chance:.2f} by chance: {got / real:.0%} of real." if real > 0 else "Recall at 5: the real images score 0.",
        "controls": _control_verdict(result),
    }  # fmt: skip
    if "adapter-short" in sets:
        gap, lost = (result["short_gap"]["adapter"][name] for name in ("kid_lite0", R5))
        lines["short"] = (
            f"Short prompts change KID by {_signed(gap)} and recall against the full captions by {_signed(lost)}."
        )
    if "drift" in result:
        drift = result["drift"]
        psnr = f"{drift['psnr_db']['value']:.1f} dB" if drift["psnr_db"] else "infinite (equal images)"
        lines["drift"] = (
            f"On general prompts the adapter changes the base's images to PSNR {psnr}, ST-LPIPS "
            f"{drift['st_lpips']['value']:.3f}, KID {_signed(drift['kid_lite0'])}."
        )
    if "memorisation" in result:
        share = result["memorisation"]["share_above_p99"]
        lines["memorisation"] = (
            f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%}) of the generated images are nearer to a "
            f"training image than 99 % of the held-out real images are; 1 % is expected without copying."
        )
    return lines


def _control_verdict(result: Mapping[str, Any]) -> str:
    if not result["controls"]:
        return "Better than every control: not measured (give --control OTHER_RUN, or --full)."
    worse_kid = [name for name, change in result["controls"].items() if change["kid_lite0"]["high"] >= 0]
    worse_recall = [name for name, change in result["controls"].items() if change[R5]["low"] <= 0]
    if result["sets"]["adapter"][R5]["low"] <= result["shuffled_captions"][R5]["high"]:
        worse_recall.append("shuffled captions")
    kid = f"no (not told apart from, or behind: {', '.join(worse_kid)})" if worse_kid else "yes"
    recall = f"no (not told apart from, or behind: {', '.join(worse_recall)})" if worse_recall else "yes"
    names = ", ".join(result["controls"])
    return f"Better than every control ({names}), by the 95 % interval of the paired difference: KID {kid}; recall {recall}."


def markdown(result: Mapping[str, Any]) -> str:
    """Tables and verdicts."""
    n, m, k = result["images"], result["references"], result["retrieval"]["at"]
    lines = [
        f"# Score of `{result['adapter']}`",
        "",
        *(f"* {line}" for line in result["verdicts"].values()),
        "",
        f"N = {n} images per set against M = {m} held-out images ({result['split']} split), {result['steps']} steps, "
        f"guidance {result['guidance']:g}, seeds from {result['seed']}. EfficientNet-Lite0 features: not comparable with "
        "Inception KID or FID. FD falls as N grows: compare it at equal N only. Brackets: 95 % intervals"
        " (bootstrap; Wilson for shares).",
        "",
        f"| set | KID (Lite0) | FD (Lite0) | caption to image, R@{k} of {result['retrieval']['gallery']} | image to caption |",
        "|---|---|---|---|---|",
        *(_row(label_of(name), entry) for name, entry in result["sets"].items()),
        _shuffled_row(result["shuffled_captions"]),
        _row(f"real images, {' against '.join(map(str, result['floors']['halves']))} (floor)", result["floors"]),
        f"| chance | | | {result['retrieval']['chance']:.3f} | {result['retrieval']['chance']:.3f} |",
    ]
    if "drift" in result:
        drift = result["drift"]
        psnr = _cell(drift["psnr_db"], 2) if drift["psnr_db"] else "infinite"
        lines += [
            "",
            f"| base against base + adapter, {drift['images']} general prompts | PSNR in dB | SSIM | ST-LPIPS | KID (Lite0) |",
            "|---|---|---|---|---|",
            f"| drift | {psnr} | {_cell(drift['ssim'])} | {_cell(drift['st_lpips'])} | {_cell(drift['kid_lite0'], 4)} |",
        ]
    if "memorisation" in result:
        memory = result["memorisation"]
        lines += [
            "",
            f"Nearest of {memory['training_images']} training images, cosine of Lite0 features: median "
            f"{memory['cosine_generated_median']:.3f} generated, {memory['cosine_held_out_median']:.3f} held-out real; "
            f"99th percentile of held-out real {memory['cosine_held_out_p99']:.3f}.",
        ]
    lines += standard_report.lines(result.get("standard", {}), label_of)
    lines += ["", *(f"Note: {line}." for line in result["skipped"])] if result["skipped"] else []
    about = [f"{key} {result[key]}" for key in ("base", "profile", "base_id", "adapter_hash") if key in result]
    versions = ", ".join(f"{name} {number}" for name, number in result.get("versions", {}).items())
    drawn = "; ".join(result["rendered_on"])
    lines += ["", f"{', '.join(about)}.", f"Drawn on {drawn}. Measured on {result.get('device', '?')}, {versions}."]
    return "\n".join(lines)


def label_of(name: str) -> str:
    return f"base + another adapter: {name.removeprefix(WRONG)}" if name.startswith(WRONG) else LABELS[name]


def _row(label: str, entry: Mapping[str, Any]) -> str:
    recall, back = _cell(entry[R5]), _cell(entry[f"{R5}_image_to_text"])
    return f"| {label} | {_cell(entry['kid_lite0'], 4)} | {entry['fd_lite0']:.1f} | {recall} | {back} |"


def _shuffled_row(entry: Mapping[str, Any]) -> str:
    return f"| base + adapter, captions shuffled | as above | as above | {_cell(entry[R5])} | {_cell(entry[f'{R5}_image_to_text'])} |"


def _cell(entry: Mapping[str, float], digits: int = 3) -> str:
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def _signed(entry: Mapping[str, float]) -> str:
    return f"{entry['value']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def _csv(result: Mapping[str, Any]) -> str:
    """One row per set and statistic: set, images, metric, value, low, high."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["set", "images", "metric", "value", "low", "high"])
    entries = {**result["sets"], "floor": result["floors"], "shuffled-captions": result["shuffled_captions"]}
    entries |= {f"adapter minus {name}": change for name, change in result["controls"].items()}
    entries |= {f"{name}-short minus {name}": change for name, change in result["short_gap"].items()}
    entries |= {name: result[name] for name in ("drift", "memorisation") if name in result}
    for name, entry in entries.items():
        for metric, value in entry.items():
            if isinstance(value, Mapping):
                writer.writerow([name, entry.get("images", ""), metric, value["value"], value["low"], value["high"]])
            elif isinstance(value, float):
                writer.writerow([name, entry.get("images", ""), metric, value, "", ""])
    for name, found in result.get("standard", {}).items():
        for one in found:
            writer.writerow([name, one["n"], one["header"], one["value"], one["low"], one["high"]])
    return buffer.getvalue()


def picture_grid(plan: ScorePlan, measured: Measured, resolution: int) -> Image.Image:
    """Rows: held-out real, base, adapter, adapter with short prompts, first control; columns: captions, evenly spaced."""
    images = measured.images
    count = min(len(images["base"]), len(plan.held_out))
    chosen = sorted({round(i) for i in torch.linspace(0, count - 1, min(COLUMNS, count)).tolist()})
    wrong = [name for name in images if name.startswith(WRONG)][:1]
    rows = [name for name in ("base", "adapter", "adapter-short", *wrong, "untrained") if name in images]
    read = reference_reader(resolution)
    pictures = [[read(plan.held_out[i].image) for i in chosen]]
    pictures += [[read_image(images[name][i]) for i in chosen] for name in rows]
    heads = [plan.captions[i] for i in chosen]
    return _sheet(pictures, ["held-out real image", *(label_of(name) for name in rows)], heads)


def nearest_pairs(plan: ScorePlan, measured: Measured, resolution: int) -> Image.Image:
    """The generated images that are nearest to a training image, above that training image."""
    assert measured.memory is not None
    order = measured.memory.similarity_N.argsort(descending=True)[:PAIRS].tolist()
    read = reference_reader(resolution)
    generated = [read_image(measured.images["adapter"][i]) for i in order]
    trained = [read(plan.train[int(measured.memory.nearest_N[i])].image) for i in order]
    heads = [
        f"cosine {float(measured.memory.similarity_N[i]):.3f}: {plan.captions[i % len(plan.captions)]}" for i in order
    ]
    return _sheet([generated, trained], ["generated", "nearest training image"], heads)


def _sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], heads: Sequence[str]) -> Image.Image:
    edge = rows[0][0].width
    size = (MARGIN + len(heads) * (edge + GAP), HEAD + len(rows) * (edge + GAP))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for column, head in enumerate(heads):
        lines = textwrap.wrap(head, width=max(8, edge // 6))[:4]
        draw.multiline_text((MARGIN + column * (edge + GAP), 4), "\n".join(lines), fill="black", font=font, spacing=1)
    for row, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
        top = HEAD + row * (edge + GAP)
        draw.multiline_text((4, top + edge // 3), "\n".join(textwrap.wrap(label, width=16)), fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (MARGIN + column * (edge + GAP), top))
    return sheet
