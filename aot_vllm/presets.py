"""The presets of the method, and the preset that each architecture gets by default, with the evidence for it.

Data only. A preset is one row of `PRESETS`. `AOTConfig.preset` makes the settings of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

STANDARD: Final = "diverse"
"""The preset where nothing else names one. It is what the defaults of `AOTConfig` say."""

_TRANSPORT: Final = {"mass": 1.0, "nearest_weight": 0.1, "kappa": 0.3}
"""Both transports of the paper, within frames and across frames, as released."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "paper": _TRANSPORT | {"anchors": "attention", "emit": "both", "iterations": 100, "local_layer": 5},
    "diverse": {"anchors": "diverse"},
    "calibrated": {"anchors": "calibrated", "distance": "cosine", "memory": "carried", "without_sinks": True},
    "coverage": {"anchors": "coverage", "distance": "cosine", "memory": "carried"},
    "transport": _TRANSPORT | {"anchors": "diverse"},
}
"""The settings of each preset that differ from the defaults of `AOTConfig`, or that name the preset's own choice."""


@dataclass(frozen=True)
class Evidence:
    """One published or measured number, on which a default rests."""

    speaks_for: str
    """What the number decides."""
    number: str
    weights: str
    """The model whose weights gave the number, and the share of tokens that it kept."""
    source: str


@dataclass(frozen=True)
class Default:
    """The preset of an architecture, and the evidence for it."""

    preset: str
    evidence: tuple[Evidence, ...]


_ONEVISION: Final = "LLaVA-OneVision-7B, 10%"
_FOUR: Final = "mean of MVBench, EgoSchema, LongVideoBench and VideoMME"
_SIGLIP: Final = (
    Evidence(
        "transport within frames",
        f"57.0 with it, 56.3 without ({_FOUR}; every token 58.4)",
        _ONEVISION,
        "AOT, arXiv 2603.01400, ablation",
    ),
    Evidence(
        "transport across frames",
        f"57.0 with it, 56.4 without ({_FOUR}; every token 58.4)",
        _ONEVISION,
        "AOT, arXiv 2603.01400, ablation",
    ),
    Evidence(
        "anchors by diversity",
        "97.1% of the unreduced score, by attention alone 96.9% (both also prune inside the language model)",
        _ONEVISION,
        "FlashVID, tables 4 and 5",
    ),
)
_QWEN2_5: Final = (
    Evidence(
        "anchors by diversity",
        "87.06% of the unreduced score, half importance 87.13%, a trained importance 81.81%",
        "Qwen2.5-VL-7B, video, 25%",
        "IDPruner, arXiv 2602.13315, table 3, from a note",
    ),
    Evidence("nothing moves", "no published number for moving tokens", "Qwen2.5-VL", "none"),
)
_QWEN3: Final = (
    Evidence(
        "anchors by diversity",
        "95.9% of the unreduced score by pairwise distance and representativeness, random 93.9%, "
        "by attention (VisionZip) 91.3%",
        "Qwen3-VL-8B, 15%",
        "GleanVID, from a note",
    ),
    Evidence(
        "nothing moves",
        "no published number for moving tokens; 91.0% with HoliTom, which merges, 95.2% with V-CAST, which drops and "
        "argues that a mean of tokens puts content where its position says something else",
        "Qwen3-VL-8B, 15%",
        "GleanVID and V-CAST, from notes",
    ),
)
_LIKE_QWEN3: Final = (
    *_QWEN3,
    Evidence("the same as Qwen3-VL", "none published; its tower and its positions are Qwen3-VL's", "Qwen3.5", "none"),
)

DEFAULTS: Final[Mapping[str, Default]] = {
    "LlavaOnevisionForConditionalGeneration": Default("transport", _SIGLIP),
    "Qwen2_5_VLForConditionalGeneration": Default("diverse", _QWEN2_5),
    "Qwen3VLForConditionalGeneration": Default("diverse", _QWEN3),
    "Qwen3VLMoeForConditionalGeneration": Default("diverse", _QWEN3),
    "Qwen3_5ForConditionalGeneration": Default("diverse", _LIKE_QWEN3),
    "Qwen3_5MoeForConditionalGeneration": Default("diverse", _LIKE_QWEN3),
}
"""The default of each architecture that AOT serves. A checkpoint or the operator may name another preset."""
