"""What can be asked of the quantizer, and what it reports back about one linear layer."""

from dataclasses import dataclass
from typing import Literal, get_args

from loragraft.quantization.formats import FORMATS, FormatName

SVDQuantNumerics = Literal["w4a8", "w4a4", "w4a16"]
"""Weight and activation bits: native, interchange, and weight-only (adaLN)."""
Numerics = Literal[SVDQuantNumerics, FormatName]
"""SVDQuant's, or one of `formats.FORMATS`."""
Smoothing = Literal["calibrated", "weight", "hadamard", "none", "auto"]
"""Where the smoothing vector comes from: measured activations, the weight alone, a rotation instead, nowhere.

"auto": the layer's measured error decides between none, smoothing, a rotation and both; on measured activations where
there are any, else data-free on the synthetic rows of `svdquant.synthetic_rows`.
"""
Search = Literal["exhaustive", "subsampled"]
Inputs = Literal["measured", "normal", "mixed"]
"""What a layer's errors are measured on: its own activations, N(0, 1) rows, or `svdquant.synthetic_rows`."""
DEFAULT_RANK = 16


@dataclass(frozen=True)
class QuantSettings:
    """How one linear layer is quantized.

    Raises ValueError on a combination that no kernel runs (a rotation or groups of 128 outside w4a8, ...).
    """

    numerics: Numerics = "w4a8"
    rank: int | None = None
    """Rank R of the 16-bit branch; None: 16, 0 for w4a16 (a tiny-M layer is bound by the bytes it reads), a format's own."""
    group_size: int = 64
    """Weights per group scale along K: 64, or 128 with w4a8. Formats have blocks of their own."""
    smoothing: Smoothing | None = None
    """None: "calibrated", or "none" for w4a16, whose activations are not quantized, and for formats, which store no vector."""
    rotation: Literal["auto", "never"] = "auto"
    """With calibrated smoothing and w4a8: "auto" also tries block-Hadamard-64 and keeps what measures best."""
    iterations: int = 10
    """Most rounds of the alternation between branch and codes; it ends at the first round that is worse."""
    grid: int = 10
    """Steps of the smoothing exponents: 2 grid candidates."""
    search: Search = "exhaustive"
    """"exhaustive": every candidate at full size, each SVD from scratch. "subsampled": candidates are judged on a part of
    the rows and outputs, the best two at full size, and the alternation's SVDs continue from one another: the same error
    within a few per cent (`benchmarks/quantizer.py`), and minutes instead of hours for a 12 B model."""
    gptq: bool = False
    """Choose the codes by GPTQ with the scales as they are; needs activation statistics."""
    seed: int = 0
    """Seeds the randomized SVD and the synthetic inputs of the data-free modes."""

    def __post_init__(self) -> None:
        if self.numerics not in get_args(Numerics):
            raise ValueError(f"numerics {self.numerics!r}: expected one of {', '.join(get_args(Numerics))}")
        if self.smoothing is not None and self.smoothing not in get_args(Smoothing):
            raise ValueError(f"smoothing {self.smoothing!r}: expected one of {', '.join(get_args(Smoothing))}")
        if self.group_size not in (64, 128):
            raise ValueError(f"group_size {self.group_size}: expected 64 or, with w4a8, 128")
        if self.group_size == 128 and self.numerics != "w4a8":
            block = "a block size of its own" if self.numerics in FORMATS else "groups of 64"
            raise ValueError(f"group_size 128 with {self.numerics}, which has {block}; only w4a8 (native) knows 128")
        if self.smoothing == "hadamard" and self.numerics != "w4a8":
            raise ValueError(
                f"smoothing 'hadamard' with {self.numerics}: only w4a8 layers store a rotation; use 'weight'"
            )
        if self.numerics == "w4a16" and self.smoothing not in (None, "none"):
            raise ValueError(f"smoothing {self.smoothing!r} with w4a16: its activations stay 16-bit; leave it out")
        if self.numerics in FORMATS and (self.smoothing not in (None, "none") or self.gptq):
            raise ValueError(f"{self.numerics} has neither smoothing nor GPTQ: it rounds to nearest; leave both out")
        if self.search not in get_args(Search):
            raise ValueError(f"search {self.search!r}: expected one of {', '.join(get_args(Search))}")
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"rank {self.rank}: expected 0 (no branch) or more")
        if self.iterations < 1 or self.grid < 1:
            raise ValueError(f"iterations {self.iterations}, grid {self.grid}: both must be at least 1")

    @property
    def branch_rank(self) -> int:
        """R, with the default resolved."""
        if self.rank is not None:
            return self.rank
        if self.numerics in FORMATS:
            return FORMATS[self.numerics].rank
        return 0 if self.numerics == "w4a16" else DEFAULT_RANK

    @property
    def needs_statistics(self) -> bool:
        """Whether the layer's activations must have been measured."""
        return self.smoothing_mode == "calibrated" or self.gptq

    @property
    def smoothing_mode(self) -> Smoothing:
        """The smoothing, with the default resolved."""
        if self.smoothing is not None:
            return self.smoothing
        return "none" if self.numerics == "w4a16" or self.numerics in FORMATS else "calibrated"

    def for_few_rows(self) -> "QuantSettings":
        """How the layers with one row per image (adaLN) are quantized beside these: W4A16, or in the same format."""
        if self.numerics in FORMATS and FORMATS[self.numerics].few_rows:
            return self
        return QuantSettings("w4a16", search=self.search, seed=self.seed)


@dataclass(frozen=True)
class LayerReport:
    """What was chosen for one layer, and what it costs. Errors are RMS ratios against the 16-bit layer."""

    path: str
    numerics: Numerics
    group_size: int
    rank: int
    smoothing: Smoothing
    alpha: float
    """smooth = max|x|^alpha / max|W|^beta per in feature."""
    beta: float
    hadamard: bool
    iterations: int
    """Rounds of the alternation that were kept."""
    weight_error: float
    """|W_eff - W| / |W|."""
    output_error: float
    """Error of the layer's output on `inputs`, activations quantized."""
    rtn_error: float
    """The same with plain rounding: no smoothing, no rotation, no branch."""
    inputs: Inputs
    """What both were measured on; errors on unlike inputs are not comparable."""
    weighted: bool = False
    """Whether the branch was fitted to the measured inputs, not to the weight alone."""
