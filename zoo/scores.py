"""The figures of a run's `score.json` as an entry keeps them: each with protocol, N, seed and hardware."""

from collections.abc import Mapping
from typing import Any

from loragraft.zoo.entry import Score

PROTOCOL = "loragraft-score/1"
"""Captions of held-out concepts, equal seeds with and without the adapter, features of EfficientNet-Lite0, the towers of
`evaluation/weights`: see `evaluation/measure.py`. Figures of equal protocol, N and references can be compared."""
METRICS = {
    "kid_lite0": "lower",
    "fd_lite0": "lower",
    "retrieval_minilm_lite0_r5": "higher",
    "retrieval_minilm_lite0_r5_image_to_text": "higher",
}
ANY_N = ("kid_lite0",)
"""Unbiased: the same at every N but for its interval. FD falls as N grows, and recall is among N images."""
TITLES = {
    "kid_lite0": "KID formula, EfficientNet-Lite0 features (not Inception KID)",
    "fd_lite0": "Frechet distance, EfficientNet-Lite0 features (not FID)",
    "retrieval_minilm_lite0_r5": "caption to image, recall at 5",
    "retrieval_minilm_lite0_r5_image_to_text": "image to caption, recall at 5",
}


def scores_of(result: Mapping[str, Any]) -> tuple[Score, ...]:
    """Every metric that `score.json` has for both the base and the adapter."""
    sets = result["sets"]
    hardware = f"drawn on {'; '.join(result['rendered_on'])}; measured on {result.get('device', 'unknown')}"
    found = []
    for metric, better in METRICS.items():
        if metric not in sets["adapter"] or metric not in sets["base"]:
            continue
        value, before = sets["adapter"][metric], sets["base"][metric]
        interval = value if isinstance(value, Mapping) else {"value": value}
        found.append(
            Score(
                metric=metric,
                value=interval["value"],
                low=interval.get("low"),
                high=interval.get("high"),
                base=before["value"] if isinstance(before, Mapping) else before,
                better=better,
                protocol=PROTOCOL,
                n=result["images"],
                references=result["references"],
                split=result["split"],
                seed=result["seed"],
                steps=result["steps"],
                guidance=result["guidance"],
                hardware=hardware,
            )
        )
    return tuple(found)
