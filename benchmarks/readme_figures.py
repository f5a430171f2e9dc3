"""The README's figures, from the committed JSON files: prints the block between the two `figures` markers.

    python benchmarks/readme_figures.py          # print
    python benchmarks/readme_figures.py --write  # put into README.md

`tests/test_readme.py` compares the two.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- figures: benchmarks/readme_figures.py -->\n", "<!-- end of figures -->"


def figures() -> str:
    """Markdown."""
    job = _read("main_job")
    parts = (
        _main_job(job),
        _domains(job),
        _base(job["pocket"]),
        _precision(job["precision"]),
        _graft(_read("adapters")),
    )
    return (
        "\n".join(
            line
            for part in (
                *parts,
                _ladder(_read("precision_ladder")),
                _transfer(_read("adapters")),
                _engine(_read("int4_engine"), _read("quantizer"), _read("sanitizer")),
                _training(_read("flux_training"), _read("preflight")),
                _bases(_read("bases"), _read("conv")),
            )
            for line in (*part, "")
        ).rstrip()
        + "\n"
    )


def with_figures(readme: str) -> str:
    """The README's text with the block renewed."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return head + START + figures() + END + tail


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def _interval(entry: dict[str, float], digits: int, sign: str = "") -> str:
    value, low, high = (f"{entry[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _main_job(result: dict[str, Any]) -> list[str]:
    seconds, score = result["seconds"], result["score"]
    base, moved = score["kid_lite0_base"], score["kid_lite0_adapter"]
    return [
        f"**The main job** ({result['device']}, commit {result['commit']}): {result['steps']} steps in "
        f"{seconds['optimizer_loop'] / 60:.1f} minutes; drawing the data set, encoding, training, drawing the grid and scoring "
        f"together {seconds['all'] / 60:.1f} minutes. Validation loss {result['validation_loss_start']:.3f} before, "
        f"{result['validation_loss_end']:.3f} after; kernel distance {base['value']:.3f} before, {moved['value']:.3f} after "
        f"(N = {score['images']}). The test suite takes {result['tests_seconds'] / 60:.0f} minutes there. All weights together: "
        f"{result['weights_mb']:.1f} MB.",
    ]


def _domains(result: dict[str, Any]) -> list[str]:
    """Both full scores in one table."""
    domains = {"marketing": result, "design": result["design"]}
    first = result
    lines = [
        f"**The domains** (held-out concepts, N = {first['images']} against {first['references']} real images, "
        f"{first['eval_steps']} Euler steps, equal seeds; 95 % intervals). KID formula on EfficientNet-Lite0 features, not "
        f"comparable with Inception KID; retrieval: a caption finds its image among {first['references']}, first five.",
        "",
        "| | KID `marketing` | KID `design` | retrieval `marketing` | retrieval `design` |",
        "|---|---|---|---|---|",
    ]
    kid = {
        name: {"base": d["kid_base"], "adapter": d["kid_adapter"], **d["control_kid"]} for name, d in domains.items()
    }
    found = {
        name: {"base": d["retrieval_base"], "adapter": d["retrieval_adapter"], **d["control_retrieval"]}
        for name, d in domains.items()
    }
    rows = {"base": ["base"], "**base + adapter**": ["adapter"], "random factors of equal strength": ["untrained"]}
    rows["the other domain's adapter"] = ["wrong-design", "wrong-marketing"]
    for label, keys in rows.items():
        cells = [
            _interval(next(table[name][key] for key in keys if key in table[name]), digits)
            for table, digits in ((kid, 3), (found, 2))
            for name in domains
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    shuffled = " | ".join(_interval(d["retrieval_shuffled"], 2) for d in domains.values())
    real = " | ".join(_interval(d["domain_real_retrieval"], 2) for d in domains.values())
    floor = " | ".join(f"{d['kid_real_floor']:.4f}" for d in domains.values())
    lines += [f"| adapter, captions shuffled | | | {shuffled} |", f"| real images | {floor} | {real} |", ""]
    for name, d in domains.items():
        gap, memory, drift = d["short_gap"]["adapter"], d["memorisation"], d["drift"]
        general = (
            f" Drift on general prompts: PSNR {drift['psnr_db']['value']:.1f} dB, ST-LPIPS {drift['st_lpips']['value']:.2f}."
            if drift
            else ""
        )
        lines.append(
            f"* `{name}`: KID falls by {100 * d['improvement']:.0f} %. Short prompts instead of long ones change KID by "
            f"{gap['kid_lite0']['value']:+.3f} and retrieval (by the full caption) by "
            f"{gap['retrieval_minilm_lite0_r5']['value']:+.2f}. Nearer to a training image than the 99th percentile of real "
            f"held-out ones: {100 * memory['share_above_p99']['value']:.1f} % of the images.{general}"
        )
    return lines


def _base(result: dict[str, Any]) -> list[str]:
    name = "retrieval_minilm_lite0_r5"
    real, drawn, blurred = result["floors"], result["drawn"], result["kid_of_blurred_real"]
    return [
        f"**`pocket` itself** on {result['images']} captions of held-out names ({result['weights']}, commit {result['commit']}): KID "
        f"{_interval(drawn['kid_lite0'], 3)}; real images blurred to half resolution have {blurred['1/2']:.3f}, to a quarter "
        f"{blurred['1/4']:.3f}, one half against the other {real['kid_lite0']['value']:.4f}. Retrieval {_interval(drawn[name], 2)} "
        f"of {result['retrieval']['gallery']}, real images {_interval(real[name], 2)}, chance {result['retrieval']['chance']:.3f}. "
        f"Autoencoder {result['autoencoder_psnr_db']['value']:.1f} dB. Nearer to a training scene than the 99th percentile of real "
        f"held-out ones: {100 * result['memorisation']['share_above_p99']['value']:.1f} %.",
    ]


def _precision(result: dict[str, Any]) -> list[str]:
    labels = {
        "rtn-w4a4": "plain rounding, W4A4",
        "svdq-w4a4": "SVDQuant, W4A4 (`interchange`)",
        "svdq-w4a8": "SVDQuant, W4A8 (`native`)",
        "nf4": "NF4 weights (bitsandbytes), 16-bit activations",
    }
    count = result["reference"]["images"]
    lines = [
        f"**16-bit against 4-bit** (`pocket`, {count} images at equal prompts and seeds, {result['reference']['steps']} steps, same "
        f"layers and groups, commit {result['commit']}):",
        "",
        "| | PSNR, dB | SSIM | ST-LPIPS | KID |",
        "|---|---|---|---|---|",
    ]
    for key, label in labels.items():
        entry = result["variants"][key]
        digits = {"psnr_db": 2, "ssim": 3, "st_lpips": 3, "kid_lite0": 4}
        lines.append(f"| {label} | {' | '.join(_interval(entry[k], d) for k, d in digits.items())} |")
    return lines


def _graft(result: dict[str, Any]) -> list[str]:
    pocket, shapes, switch = result["graft"]["pocket"], result["graft"]["flux_shapes"], result["switch"]
    first = next(iter(shapes.values()))
    parts = [pocket, *shapes.values()]
    grafted, apart = (max(part[f"bf16_{kind}_vs_float64_worst"] for part in parts) for kind in ("grafted", "apart"))
    times = (
        f"Switching among {switch['adapters']} resident adapters of rank {switch['rank']} on `{switch['base']}`: "
        f"{switch['switch_ms']:.1f} ms (median; slowest {switch['switch_ms_slowest']:.1f}) on {switch['device']}, "
        f"{switch['layers']} layers, {switch['resident_gib']:.1f} GiB resident."
        if switch["switch_ms"] is not None
        else f"Switching: {switch['why']}."
    )
    return [
        f"**The graft** (commit {result['commit'][:7]}): the trained `{pocket['recipe']}` adapter on `pocket`, {pocket['layers']} layers on "
        f"their real inputs, moves the predicted velocity by {100 * pocket['velocity_change']:.0f} %; and on {first['layers']} layers of "
        f"FLUX.1's shapes (width {first['width']}, {' and '.join(f'`{name}`' for name in shapes)}) an adapter of rank {first['rank']} that "
        f"was trained there. Worst layer, grafted against the adapter kept apart, same bf16 factors: "
        f"{result['graft_rel_dev_fp32']:.1e} in float32, {result['graft_rel_dev_bf16']:.1e} in bf16; against float64 in bf16 "
        f"{grafted:.1e} grafted, {apart:.1e} apart. Taking it off restores every byte: "
        f"{'yes' if all(part['undo_restores_every_byte'] for part in parts) else 'NO'}. {times}",
    ]


def _ladder(result: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{name}` | {row['file_mb']:.1f} | {1e3 * row['seconds_per_step']:.1f} | {1e3 * row['seconds_per_image']:.1f} | "
        f"{row['peak_training_mib']:.0f} | {row['to_16bit']['psnr_db']['value'] if row.get('to_16bit') else math.inf:.1f} | "
        f"{row['kid_base']['value']:.3f} | {_interval(row['kid_adapted'], 3)}{'' if _on_cpu(row) else ' *'} |"
        for name, row in result["precisions"].items()
    ]
    return [
        f"**The precision ladder** (`numerics` on `pocket`, recipe `{result['recipe']}`, {result['steps']} steps, N = {result['images']} held-out "
        f"captions, KID with 95 % intervals; times and peak on {', '.join(result['timed_on'])}). PSNR is that of the base's pictures to the "
        "16-bit base's. Rows with * were trained and drawn on the GPU, the others on a CPU: the noise of equal seeds differs between them, so "
        "their KID is not comparable to a few thousandths.",
        "",
        "| | file, MB | ms a step | ms an image | peak, MiB | PSNR, dB | KID, base | KID after LoRA |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def _on_cpu(row: dict[str, Any]) -> bool:
    return all(name.startswith("cpu") for name in row["drawn_on"]["adapted"])


def _transfer(result: dict[str, Any]) -> list[str]:
    lines = [
        f"**An adapter on another precision** (`pocket`, N = {result['images']} held-out captions a cell, KID with 95 % intervals to the real "
        "images; rows: trained on, columns: run on). Below, what people do instead of grafting: the 16-bit adapter merged into the weights, "
        "which are quantized again; R is the base's rank, r the adapter's, and the change is against the graft of the same adapter.",
        "",
    ]
    for recipe, table in result["transfer"].items():
        columns = list(table["none"])
        lines += [f"| {recipe} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(_kid(row[on]) for on in columns)} |" for name, row in table.items()]
        lines.append("")
    lines += ["| merged, quantized again | | KID | change |", "|---|---|---|---|"]
    lines += [
        f"| {recipe} | {method} | {_kid(entry)} | {_interval(entry['kid_change'], 4, sign='+')} |"
        for recipe, methods in result["merge_requantize"].items()
        for method, entry in methods.items()
    ]
    return lines


def _kid(entry: dict[str, Any]) -> str:
    return _interval(entry["kid_lite0"], 3)


def _in_time(preflight: dict[str, Any]) -> int:
    return sum(found["time_holds"] for found in preflight["configurations"].values())


def _training(result: dict[str, Any], preflight: dict[str, Any]) -> list[str]:
    parts = result["parts"]
    shown = {
        "bf16 + PEFT, eager": "bf16_eager_1024",
        "bf16 + PEFT, compiled": "bf16_compiled_1024",
        "bf16 + PEFT, compiled, FlashAttention-4": "bf16_compiled_1024_same_attention",
        "ours, `checkpointing=none`": "ours_1024_keep_all",
        "ours, `gelu`": "ours_1024",
        "ours, `cheap`": "ours_1024_cheap",
        "ours, `block`": "ours_1024_ckpt",
        "ours, `block`, `offload_activations`": "ours_1024_ckpt_offload",
        "FP8 weights and activations + PEFT, compiled (SDPA)": "fp8_compiled_1024",
        "bf16 + PEFT, eager, NF4 weights (bitsandbytes)": "nf4_eager_1024",
        "PEFT on SDNQ (UINT4 weights, INT8 products), its functions compiled": "sdnq_eager_1024",
        "bf16 + PEFT, eager, 512 px": "bf16_eager_512",
        "bf16 + PEFT, compiled, 512 px": "bf16_compiled_512",
        "ours, `none`, 512 px": "ours_512",
    }
    rows = [
        f"| {name} | {parts[key]['step_ms']:.0f} | {parts[key]['peak_gib']:.1f} | {_seconds(parts[key])} |"
        for name, key in shown.items()
        if key in parts
    ]
    beside = any(part.get("timed_alone") for part in parts.values())
    whole, small, versions = parts["whole_run_1024"], parts["whole_run_512"], result["versions"]
    one, two, idle = parts["ddp_1"], parts["ddp_2"], parts["idle"]
    return [
        f"**Training at FLUX.1-dev's size** ({parts['ours_1024']['device']}, torch {versions['torch']}, Triton {versions['triton']}; "
        "random weights, 1024 px, batch 1, rank 16 on attention and feed-forward, FlashAttention-4 unless SDPA is the rule there, "
        "forward + backward + AdamW; each variant in its own process, on commits "
        f"{', '.join(commit[:7] for commit in result['commit'])}). With `gelu` a step is {result['step_1024_vs_compiled']:.2f} times as "
        f"fast as compiled bf16 as people run it, {result['step_1024_vs_eager']:.2f} times as eager bf16, "
        f"{result['step_1024_vs_compiled_same_attention']:.2f} times as compiled bf16 with the same attention. Losses over 20 steps "
        f"differ from bf16 on the same weights by at most {result['loss_worst_pct']:.1f} %. A whole run of `train/lora.py` (encode, "
        f"train, validate, sample, save; SDPA, `block`) finished under a hard cap of {whole['cap_gib']} GiB of reserved memory; at "
        f"512 px, with `adamw8bit` and `offload_activations`, under {small['cap_gib']} GiB"
        f"{', its first step after ' + _seconds(small) + ' s' if small['first_step_seconds'] is not None else ''}. First steps: "
        + (
            "`gelu`'s is with cold caches and nothing beside it; the others ran side by side, stopped only while one was timed."
            if beside
            else "`gelu`'s is with cold caches, the others are as their calls found them."
        ),
        "",
        *_images(result),
        "",
        f"Two GPUs (2 x {two['device']}, commit {two['commit'][:7]}, {one['images']} cached images of four formats at {one['edge']} px, batch "
        f"{one['batch']} each): {two['images_per_second']:.1f} images a second, {result['ddp2_scaling']:.2f} times one GPU's; one GPU is idle "
        f"{100 * idle['idle_share']:.1f} % of the time. With FSDP each holds {100 * result['fsdp_held_share']:.0f} % of the base. Preflight foretold "
        f"the peaks of {len(preflight['configurations'])} configurations of FLUX.1, SDXL and SANA within "
        f"{preflight['preflight_worst_pct']:.1f} %, the seconds of those that are replayed from CUDA graphs, as runs train and draw, within "
        f"{preflight['replayed_time_worst_pct']:.0f} %, and of all of them {_in_time(preflight)} within 25 % (worst: "
        f"{preflight['time_worst_pct']:.0f} %; commit {preflight['commit'][:7]}).",
        "",
        "| | ms a step | peak GiB | seconds to the first step |",
        "|---|---|---|---|",
        *rows,
    ]


def _images(result: dict[str, Any]) -> list[str]:
    """Rows of the parts that are there."""
    parts = result["parts"]
    labels = {
        "ours_image": "ours",
        "bf16_image": "bf16",
        "fp8_image": "FP8 weights and activations (modulations bf16)",
        "nf4_image": "NF4 weights (bitsandbytes)",
    }
    ratios = {"bf16": "bf16", "FP8": "fp8", "NF4": "nf4"}
    faster = ", ".join(
        f"{result[key]:.2f} times as fast as {name}"
        for name, end in ratios.items()
        if result.get(key := f"image_20_steps_vs_{end}") is not None
    )
    rows = []
    for key, label in labels.items():
        part = parts.get(key, {})
        for row, prefix in ((label, ""), (f"{label}, adapter grafted", "grafted_")):
            if f"{prefix}peak_gib" in part:
                seconds = [part[f"{prefix}image_{steps}_steps_seconds"] for steps in (20, 4)]
                rows.append(
                    f"| {row} | {seconds[0]:.2f} | {seconds[1]:.2f} | {part['transformer_gib']:.1f} | {part[f'{prefix}peak_gib']:.1f} |"
                )
    return [
        f"An image of 1024 px, decoding included, each compiled and with FlashAttention-4: ours takes 20 steps {faster}.",
        "",
        "| | s an image, 20 steps | 4 steps | transformer, GiB | peak GiB |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _seconds(part: dict[str, Any]) -> str:
    """To the first step; a dash where others ran beside it."""
    return "–" if part["first_step_seconds"] is None else f"{part['first_step_seconds']:.0f}"


def _bases(result: dict[str, Any], conv: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{name}` | {row['step']}, {row['pixels']} px | {row['step_ms']:.0f} | {row['peak_gib']:.2f} | {row['preflight_gib']:.2f} | "
        f"{row['file_gb']:.2f} | {row['file_gb_16bit']:.2f} |"
        for name, row in result["bases"].items()
    ]
    times = conv["batches"]["1"]
    return [
        f"**Every base at its true shapes** ({result['device']}, random weights, batch 1, commits {', '.join(result['commit'])}): a "
        "training step (rank 16, `checkpointing` as its recipe has it, replayed from a CUDA graph, blocks not compiled), or a forward "
        "pass, launched eagerly, of a base that is not trained on.",
        "",
        "| | | ms | peak GiB | preflight said | INT4 file, GB | 16 bits, GB |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"All 3x3 convolutions of SDXL's UNet at 1024 px (same card, commit {conv['commit'][:7]}), quantization, bias and branch of rank "
        f"48 included: {times['convs_ms_w4a8']:.2f} ms against {times['convs_ms_bf16']:.2f} ms of cuDNN in bf16, "
        f"{times['conv_vs_cudnn']:.2f} times as fast ({times['conv_vs_cudnn_no_branch']:.2f} without the branch; "
        f"{times['conv_vs_cudnn_worst_shape']:.2f} at the worst shape, a stride of 2); errors against float64 of the same quantized "
        f"operands up to {max(conv['max_rel_err'].values()):.1e}.",
    ]


def _engine(result: dict[str, Any], quantizer: dict[str, Any], sanitizer: dict[str, Any]) -> list[str]:
    flux = {name: row for name, row in result["forward_us"].items() if not name.startswith(("SDXL", "SANA"))}
    rows = [
        f"| {name} ({row['count']} x {row['M']} x {row['N']} x {row['K']}) | {row['bf16']:.0f} | {row['w4a8']:.0f} | "
        f"{row['bf16'] / row['w4a8']:.2f} | {row['fp8']:.0f} | {row['w4a4']:.0f} | {train['bf16_peft']:.0f} | "
        f"{train['w4a8_int8_dgrad']:.0f} | {train['bf16_peft'] / train['w4a8_int8_dgrad']:.2f} |"
        for name, row in flux.items()
        for train in (result["train_us"][name],)
    ]
    return [
        f"**The INT4 engine** ({result['device']}, torch {result['versions']['torch']}, Triton {result['versions']['triton']}, "
        f"commit {result['commit'][:7]}): all block linears of FLUX.1-dev at 1024 px, activation quantization, bias and a "
        f"branch of rank 48 (32 of the base, 16 of an adapter) included. Forward {result['linears_ms_w4a8']:.1f} ms against "
        f"{result['linears_ms_bf16']:.1f} ms of bf16 without any branch ({result['linears_speedup_w4a8']:.2f} times as fast; "
        f"FP8 with its quantization and no branch is {1 / result['linears_vs_fp8']:.2f} times as fast as ours); forward and "
        f"gradients {result['train_linears_speedup_w4a8']:.2f} times as fast as bf16 with PEFT's LoRA "
        f"({result['train_linears_speedup_w4a8_bf16_dgrad']:.2f} with a bf16 gradient of x), GPU time of replayed graphs: "
        f"launched one by one from Python, ours still takes {1 / result['train_linears_speedup_w4a8_eager']:.1f} times as long. "
        f"The branch costs {result['branch_cost_pct']:.1f} % over none, a second adapter of rank 16 {result['graft_cost_pct']:.1f} % more. "
        f"W4A4 in groups of 64 runs at {result['w4a4_vs_bf16']:.2f} of bf16, {result['w4a4_vs_comfy_kitchen']:.0f} times "
        f"comfy-kitchen's kernels on this card; NF4 at {result['nf4_vs_bf16']:.2f} of bf16. Largest error against float64 of "
        f"the same codes {100 * result['max_rel_err']:.2f} %. A FLUX.1-dev-shaped model is quantized without data in "
        f"{quantizer['seconds']:.0f} s to {quantizer['file_gb']:.1f} GB, {quantizer['peak_gpu_gib']:.1f} GiB of GPU memory; on inputs of its "
        f"own in {result['calibrated_seconds']:.0f} s, eight passes included (reading the 16-bit weights is not). NVIDIA's compute-sanitizer "
        f"({' and '.join(sanitizer['tools'])}) found nothing in the {sanitizer['kernels']} kernels that `kernels/` had at commit "
        f"{sanitizer['commit'][:7]}, forward and backward at ragged shapes, and found an error that was planted.",
        "",
        "| layers (M x N x K), microseconds | bf16 | W4A8 | ratio | FP8 | W4A4 | training: bf16 + PEFT | W4A8 | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "![operations a second against operations a byte](docs/images/roofline.png)",
    ]


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(with_figures(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(figures(), end="")
