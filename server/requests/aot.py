"""Parser of `aot`, the field in which a request asks for a retention and for frames."""

from collections.abc import Mapping
from typing import Any

from server.aliases import Asked, Sampling
from server.errors import GatewayError, InvalidRequest, RetentionRefused, SamplingRefused

KEYS = ("retention", "tokens", "frames", "fps", "start", "end")


def read_aot(value: object) -> Asked:
    """Return what `value`, the content of `aot`, asks for.

    Raises RetentionRefused, SamplingRefused or InvalidRequest, with the key as `param`.
    """
    if value is None:
        return Asked()
    if not isinstance(value, dict):
        raise RetentionRefused('aot must be an object like {"retention": 0.15}', param="aot")
    for name in value:
        if name not in KEYS:
            shown = name[:80]
            known = ", ".join(KEYS)
            raise InvalidRequest(
                f"aot has no key {shown!r}; it takes {known}", param=f"aot.{shown}", code="invalid_aot"
            )
    for one, other in (("retention", "tokens"), ("frames", "fps")):
        if value.get(one) is not None and value.get(other) is not None:
            raise InvalidRequest(
                f"aot must hold one of {one} and {other}, not both", param=f"aot.{other}", code="invalid_aot"
            )
    start, end = _range(value)
    return Asked(
        retention=_retention(value.get("retention")),
        tokens=_count(value, "tokens", RetentionRefused),
        sampling=Sampling(
            frames=_count(value, "frames", SamplingRefused),
            fps=_number(value, "fps", zero_is_taken=False),
            start_seconds=start,
            end_seconds=end,
        ),
    )


def _retention(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RetentionRefused("aot.retention must be a number in (0, 1]", param="aot.retention")
    if not 0 < value <= 1:
        shown = f", got {value:g}" if abs(value) < 10**6 else ""
        raise RetentionRefused(f"aot.retention must be in (0, 1]{shown}", param="aot.retention")
    return float(value)


def _count(fields: Mapping[str, Any], name: str, refused: type[GatewayError]) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value < 10**9:
        raise refused(f"aot.{name} must be a whole number from 1 on", param=f"aot.{name}")
    return value


def _number(fields: Mapping[str, Any], name: str, *, zero_is_taken: bool) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**9
    if not is_number or not (value >= 0 if zero_is_taken else value > 0):
        least = "from 0 on" if zero_is_taken else "above 0"
        raise SamplingRefused(f"aot.{name} must be a number {least}", param=f"aot.{name}")
    return float(value)


def _range(fields: Mapping[str, Any]) -> tuple[float | None, float | None]:
    start, end = _number(fields, "start", zero_is_taken=True), _number(fields, "end", zero_is_taken=False)
    if end is not None and not end > (start or 0.0):
        raise SamplingRefused(f"aot.end must be above aot.start, got {end:g} and {start or 0:g}", param="aot.end")
    return start, end
