"""Settings of the reduction: parsed and checked once, in a frozen object that is passed as an argument."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args

from aot_vllm.errors import SettingError
from aot_vllm.presets import PRESETS, STANDARD

Anchors = Literal["diverse", "attention", "calibrated", "coverage"]
Emit = Literal["both", "compact"]
Distance = Literal["euclidean", "cosine"]
Memory = Literal["previous", "carried", "all"]


def check_integer(name: str, value: object, *, minimum: int | None = None) -> int:
    """Return `value` as an int.

    Raises `SettingError` for a value below `minimum` and for any type but an integer. A bool is not an integer here.
    """
    range_text = "an integer" if minimum is None else f"an integer of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral) or (minimum is not None and value < minimum):
        raise SettingError(f"{name} must be {range_text}, got {value!r}")
    return int(value)


def check_real(
    name: str, value: object, *, low: float = 0.0, high: float = math.inf, low_included: bool = True
) -> float:
    """Return `value` as a float in [`low`, `high`], or in (`low`, `high`] without `low_included`.

    Raises `SettingError` for bools, strings, None, NaN, infinities and numbers outside the range.
    """
    if high < math.inf:
        range_text = f"in {'[' if low_included else '('}{low:g}, {high:g}]"
    else:
        range_text = f"a finite number {'of at least' if low_included else 'above'} {low:g}"
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    above = number >= low if low_included else number > low
    if not (math.isfinite(number) and above and number <= high):
        raise SettingError(f"{name} must be {range_text}, got {value!r}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `SettingError` unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        *most, last = map(repr, choices)
        raise SettingError(f"{name} must be {', '.join(most)} or {last}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise `SettingError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise SettingError(f"{name} must be true or false, got {value!r}")


def check_retention(value: object) -> float:
    """Return `value`, the fraction of video tokens to keep; raises `SettingError` unless it is in (0, 1]."""
    return check_real("retention", value, high=1.0, low_included=False)


def quantise_retention(value: object, *, step: float = 0.01) -> float:
    """Return `value` rounded to a multiple of `step`, at least one step.

    This is for retentions that arrive with a request. Budgets, layouts and multimodal inputs are cached by retention.
    With a hundred distinct values these caches hit; with a continuum they would not. The server-wide retention is used
    exactly as given. Raises `SettingError` for a retention outside (0, 1].
    """
    steps_per_unit = round(1 / check_real("step", step, high=1.0, low_included=False))
    return max(1, round(check_retention(value) * steps_per_unit)) / steps_per_unit


@dataclass(frozen=True, kw_only=True)
class AOTConfig:
    """Every setting of the method.

    `AOTConfig.preset` gives the presets by name, `aot_vllm.presets` says what they are. The defaults below are those of
    `diverse`, which moves nothing. Some settings take effect only beside others (`USED_WITH`). The others are ignored
    here, and refused by `from_mapping`, which reads what people write.
    """

    anchors: Anchors = "diverse"
    """How a frame chooses its anchors. `diverse` chooses tokens far from each other and from the tokens that the
    previous frame keeps. `calibrated` does too, but the distances of a token count by the attention that it receives
    and by its relevance. `coverage` chooses tokens such that every token is near one of them, on average. `attention`,
    as released, chooses the tokens that receive most attention in two layers of the vision tower."""

    distance: Distance = "euclidean"
    """How distances between tokens are measured: `euclidean`, or `cosine`, the distance of their directions. By either,
    a token of extreme length is no more than an ordinary one."""

    memory: Memory = "previous"
    """From which tokens of earlier frames a frame stays away. `previous`: those that the previous frame keeps. `all`:
    those that any earlier frame keeps. `carried`: the same by an upper bound of the distances, at no more cost than
    `previous`; what is kept counts as long as its content stays in place."""

    by_attention: bool = True
    """Whether distances count by the attention that a token receives, in medians of its frame."""

    by_relevance: bool = True
    """Whether distances count by the similarity of a token to the mean of its segment, a run of similar frames."""

    without_sinks: bool = False
    """Whether attention that a position receives in all frames is taken out: it counts as ordinary attention."""

    global_ratio: float = 0.5
    """Share of a frame's anchors chosen by global score, in [0, 1]. The rest are chosen by local score, window by
    window."""

    window: int = 9
    """Side of a local window in cells. A window of 9 cuts the 27x27 grid of SigLIP-so400m into nine. A side that
    `window` does not divide is cut evenly: the 14x14 pooled grid of LLaVA-OneVision becomes four windows of 7x7."""

    epsilon: float = 0.1
    """Entropic regularisation: the kernel is exp(-cost / epsilon)."""

    iterations: int = 20
    """Most Sinkhorn iterations per solve. The paper allows 100, but its stopping rule ends after 2 to 9. A GPU runs all
    of them, because ending early would cost a synchronisation. Without Triton, each further iteration costs a dozen
    launches and changes nothing."""

    tolerance: float = 1e-2
    """A solve has converged when an iteration moves its row scaling by less than this on average."""

    spatial_weight: float = 0.5
    """Weight of the spatial distance in the cost within a frame. Distances are measured on the unit square. The term is
    in the released code, not in the paper."""

    mass: float = 0.0
    """Total mass that the other tokens of a frame carry to its anchors. Each anchor has a mass of 1 of its own. The
    released code uses 1. With a mass equal to the number of other tokens, each carries all of itself. With a mass of 0
    and a `nearest_weight` of 0, nothing is merged within a frame."""

    nearest_weight: float = 0.0
    """Share, in [0, 1], of the plain mean of an anchor and its nearest tokens in the merged anchor. The released code
    uses 0.1. The paper has no such term."""

    temporal_sigma: float = 1.5
    """Width in frames of the temporal discount. Costs between frames that are dt apart are multiplied by
    1 - exp(-dt^2 / (2 sigma^2)), which is close to 1 beyond a few sigma."""

    clips: int = 8
    """Number of clips that a video is cut into, each with one key frame. A video never has more clips than frames."""

    kappa: float = 1.0
    """Share, in [0, 1], of a later frame's anchors that are kept. The key frame absorbs the others. At 1 the video is
    one clip whose frames have equally many tokens, and nothing is merged across frames. The released code uses 0.3."""

    emit: Emit = "compact"
    """How often the anchors of a key frame are emitted. `both`, as released, emits them twice: as they were in the key
    frame's place, and after absorbing at the end of the clip. `compact` emits them once: after absorbing, in the key
    frame's place."""

    local_layer: int | None = None
    """Encoder layer whose attention gives the local score, counted among the layers that are executed. Shallow layers
    attend to neighbourhoods. None chooses the layer at the same relative depth as layer 5 of 26 in the released
    code."""

    global_layer: int = -2
    """Encoder layer whose attention gives the global score. Negative values count from the last executed layer."""

    def __post_init__(self) -> None:
        """Check every value. Numbers are stored as plain int and float, so that equal settings have equal digests."""
        checked = {
            "global_ratio": check_real("global_ratio", self.global_ratio, high=1.0),
            "window": check_integer("window", self.window, minimum=1),
            "epsilon": check_real("epsilon", self.epsilon, low_included=False),
            "iterations": check_integer("iterations", self.iterations, minimum=1),
            "tolerance": check_real("tolerance", self.tolerance),
            "spatial_weight": check_real("spatial_weight", self.spatial_weight),
            "mass": check_real("mass", self.mass),
            "nearest_weight": check_real("nearest_weight", self.nearest_weight, high=1.0),
            "temporal_sigma": check_real("temporal_sigma", self.temporal_sigma, low_included=False),
            "clips": check_integer("clips", self.clips, minimum=1),
            "kappa": check_real("kappa", self.kappa, high=1.0),
            "local_layer": None if self.local_layer is None else check_integer("local_layer", self.local_layer),
            "global_layer": check_integer("global_layer", self.global_layer),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name, choices in {"anchors": Anchors, "distance": Distance, "memory": Memory, "emit": Emit}.items():
            check_choice(name, getattr(self, name), get_args(choices))
        for name in ("by_attention", "by_relevance", "without_sinks"):
            check_flag(name, getattr(self, name))

    @classmethod
    def preset(cls, name: object) -> Self:
        """Return the settings of a preset; raises `SettingError` for a name that is not in `PRESETS`."""
        if not isinstance(name, str) or name not in PRESETS:
            raise SettingError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    @classmethod
    def paper(cls) -> Self:
        """Return the settings of the released code, the preset `paper`."""
        return cls.preset("paper")

    @classmethod
    def from_mapping(cls, mapping: object) -> Self:
        """Return the settings of the preset that `mapping` names, changed by the single settings in `mapping`.

        Without a preset these are changes to `STANDARD`. Raises `SettingError` for an unknown name, and for a setting
        that takes no effect.
        """
        if not isinstance(mapping, Mapping):
            raise SettingError(f"AOT settings must be a mapping of names to values, got {mapping!r}")
        preset = mapping.get("preset", STANDARD)
        single = {name: value for name, value in mapping.items() if name != "preset"}
        return cls.preset(preset).changed(single, preset=preset)

    def changed(self, single: Mapping[Any, Any], *, preset: str) -> Self:
        """Return these settings, changed by `single` settings; `preset` is the preset that errors name.

        Raises `SettingError` for an unknown name, and for a setting that takes no effect after the change.
        """
        allowed = ["preset", *(field.name for field in fields(self))]
        unknown = [str(name) for name in single if name not in allowed]
        if unknown:
            raise SettingError(f"unknown AOT settings: {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        config = replace(self, **single)
        if idle := [name for name in single if not config.uses(name)]:
            raise SettingError("; ".join(_no_effect(name, preset) for name in idle))
        return config

    def uses(self, name: str) -> bool:
        """Return whether the setting `name` takes effect beside the others."""
        return name not in USED_WITH or USED_WITH[name].holds(self)

    def settings(self) -> dict[str, Any]:
        """Return all settings by name, as values that JSON can represent."""
        return asdict(self)

    def in_effect(self) -> dict[str, Any]:
        """Return the settings that take effect, by name."""
        return {name: value for name, value in self.settings().items() if self.uses(name)}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the settings that take effect, for use in cache keys."""
        return hashlib.sha256(json.dumps(self.in_effect(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Condition:
    """What other settings must be for a setting to take effect, in words and as a function."""

    words: str
    holds: Callable[[AOTConfig], bool]


_GREEDY = Condition('anchors "diverse", "calibrated" or "coverage"', lambda config: config.anchors != "attention")
_CALIBRATED = Condition('anchors "calibrated"', lambda config: config.anchors == "calibrated")
_SCORED = Condition(
    'anchors "attention", or "calibrated" by attention',
    lambda config: config.anchors == "attention" or (config.anchors == "calibrated" and config.by_attention),
)
_ATTENTION = Condition('anchors "attention"', lambda config: config.anchors == "attention")
_LOCAL = Condition(
    'anchors "attention" and a global_ratio below 1',
    lambda config: config.anchors == "attention" and config.global_ratio < 1,
)
_WITHIN = Condition("a mass above 0", lambda config: config.mass > 0)
_ACROSS = Condition("a kappa below 1", lambda config: config.kappa < 1)
_SOLVED = Condition("a mass above 0 or a kappa below 1", lambda config: config.mass > 0 or config.kappa < 1)
USED_WITH: Mapping[str, Condition] = {
    "distance": _GREEDY,
    "memory": _GREEDY,
    "by_attention": _CALIBRATED,
    "by_relevance": _CALIBRATED,
    "without_sinks": _SCORED,
    "global_ratio": _ATTENTION,
    "global_layer": _SCORED,
    "window": _LOCAL,
    "local_layer": _LOCAL,
    "spatial_weight": _WITHIN,
    "temporal_sigma": _ACROSS,
    "clips": _ACROSS,
    "epsilon": _SOLVED,
    "iterations": _SOLVED,
    "tolerance": _SOLVED,
}
"""The condition of each setting that does not always take effect."""


def _no_effect(name: str, preset: str) -> str:
    """Return why the setting `name` takes no effect, and which presets use it."""
    using = ", ".join(other for other in PRESETS if AOTConfig.preset(other).uses(name))
    return (
        f"{name} takes no effect with preset {preset}, because it needs {USED_WITH[name].words}; "
        f"presets that use it: {using or 'none'}"
    )
