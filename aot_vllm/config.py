"""Settings of the reduction: parsed once into a frozen object, checked there, passed on as an argument."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, Self

from aot_vllm.errors import SettingError

Anchors = Literal["diverse", "attention"]
Emit = Literal["both", "compact"]


def check_integer(name: str, value: object, *, minimum: int | None = None) -> int:
    """Return `value` as an int.

    Raises `SettingError` for anything but an integer (a bool is none) of at least `minimum`.
    """
    range_text = "an integer" if minimum is None else f"an integer of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral) or (minimum is not None and value < minimum):
        raise SettingError(f"{name} must be {range_text}, got {value!r}")
    return int(value)


def check_real(
    name: str, value: object, *, low: float = 0.0, high: float = math.inf, low_included: bool = True
) -> float:
    """Return `value` as a float.

    Raises `SettingError` for bools, strings, None, NaN, infinities and numbers outside `low` to `high` (included).
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


def check_retention(value: object) -> float:
    """Return the fraction of video tokens to keep, in (0, 1]; raises `SettingError` otherwise."""
    return check_real("retention", value, high=1.0, low_included=False)


def quantise_retention(value: object, *, step: float = 0.01) -> float:
    """Return `value` rounded to a multiple of `step`, at least one step.

    For retentions that arrive with a request: a hundred distinct values let budgets, layouts and multimodal caches be
    found again, a continuum would not. A server-wide retention is used exactly as given.
    """
    steps_per_unit = round(1 / check_real("step", step, high=1.0, low_included=False))
    return max(1, round(check_retention(value) * steps_per_unit)) / steps_per_unit


@dataclass(frozen=True, kw_only=True)
class AOTConfig:
    """Every setting of the method.

    The defaults are those of the released code but for what measurements spoke against: `anchors`, `mass`,
    `nearest_weight`, `emit` and `kappa`, by the answers that are left (docs/accuracy.md), and `iterations`, by time;
    and `local_layer`, for towers of other depths. `AOTConfig.paper()` is the released behaviour without exception.
    """

    anchors: Anchors = "diverse"
    """Which tokens of a frame become anchors: `diverse` takes those farthest from each other and from what the frame
    before keeps, `attention`, as released, those that receive most attention in two layers of the vision tower."""

    global_ratio: float = 0.5
    """Share of a frame's anchors chosen by global score, in [0, 1]; the rest are local, window by window. `window`, the
    two layers and this are of use to `attention` alone."""

    window: int = 9
    """Side of a local window in cells. 9 cuts the 27x27 grid of SigLIP-so400m into nine; a side that it
    does not divide is cut evenly, so the 14x14 cells that LLaVA-OneVision pools to become four windows of 7x7."""

    epsilon: float = 0.1
    """Entropic regularisation: the kernel is exp(-cost / epsilon)."""

    iterations: int = 20
    """Most Sinkhorn iterations per solve. The paper allows 100, but its stopping rule ends after 2 to 9, and on a GPU,
    where ending early would cost a synchronisation, each further iteration is a dozen launches for nothing."""

    tolerance: float = 1e-2
    """A solve has converged when its row scaling moved by less than this on average."""

    spatial_weight: float = 0.5
    """Weight of the distance on the unit square in the cost inside a frame (released code; the paper has none)."""

    mass: float = 0.2
    """Mass that a frame's other tokens carry to its anchors, all of them together; an anchor's own is 1. 1 as released,
    for grids of 729 cells: where a frame has few anchors they take in more than they can. With as much as there are
    other tokens each carries all of itself; at 0, with `nearest_weight` at 0, nothing moves."""

    nearest_weight: float = 0.0
    """Share, in [0, 1], of the plain mean over each anchor's nearest tokens. 0.1 in the released code; the paper has
    none."""

    temporal_sigma: float = 1.5
    """Frames after which the cost across frames has left its discount: 1 - exp(-dt^2 / (2 sigma^2))."""

    clips: int = 8
    """Clips a video is cut into, each with one key frame; never more than frames. Of use where `kappa` is below 1."""

    kappa: float = 1.0
    """Share, in [0, 1], of a later frame's anchors that are kept; the key frame absorbs the others. At 1 the video is
    one clip whose frames have equally many tokens, and nothing moves between them. The released code has 0.3."""

    emit: Emit = "compact"
    """`both` emits a key frame's anchors before absorbing, and after it at the end of the clip, as released; `compact`
    emits them after absorbing alone, in the key frame's place."""

    local_layer: int | None = None
    """Executed encoder layer whose attention gives the local score: shallow layers look at neighbourhoods. None is the
    layer as deep, relative to the tower, as the released code's layer 5 of 26."""

    global_layer: int = -2
    """Executed encoder layer whose attention gives the global score; negative counts from the last executed."""

    def __post_init__(self) -> None:
        """Check every value; numbers are stored as plain int and float, so that equal settings have one digest."""
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
        if self.anchors not in ("diverse", "attention"):
            raise SettingError(f"anchors must be 'diverse' or 'attention', got {self.anchors!r}")
        if self.emit not in ("both", "compact"):
            raise SettingError(f"emit must be 'both' or 'compact', got {self.emit!r}")

    @classmethod
    def paper(cls) -> Self:
        """Return the settings of the released code."""
        return cls(
            anchors="attention",
            mass=1.0,
            nearest_weight=0.1,
            emit="both",
            kappa=0.3,
            iterations=100,
            local_layer=5,
        )

    @classmethod
    def from_mapping(cls, mapping: object) -> Self:
        """Return the settings in `mapping`, defaults for the rest; raises `SettingError` for keys it does not know."""
        if not isinstance(mapping, Mapping):
            raise SettingError(f"AOT settings must be a mapping of names to values, got {mapping!r}")
        allowed = [field.name for field in fields(cls)]
        unknown = [str(key) for key in mapping if key not in allowed]
        if unknown:
            raise SettingError(f"unknown AOT settings: {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        return cls(**mapping)

    def settings(self) -> dict[str, Any]:
        """Return all settings by name, as plain values that JSON can carry."""
        return asdict(self)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change when any setting does: a part of cache keys."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]
