import dataclasses
import math

import numpy as np
import pytest

from aot_vllm import AOTConfig
from aot_vllm.config import check_retention, quantise_retention
from aot_vllm.errors import AOTError, SettingError

NO_NUMBERS = ["0.5", None, True, False, math.nan, math.inf, -math.inf, [], 1j]
REALS = ["global_ratio", "epsilon", "tolerance", "spatial_weight", "mass", "nearest_weight", "temporal_sigma", "kappa"]
INTEGERS = ["window", "iterations", "clips", "local_layer", "global_layer"]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in REALS + INTEGERS for value in NO_NUMBERS if (name, value) != ("local_layer", None)],
)
def test_a_value_that_is_not_a_finite_number_is_refused_by_name_and_value(name, value):
    with pytest.raises(SettingError, match=rf"^{name} must be .*, got ") as error:
        AOTConfig(**{name: value})
    assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, bad) for name in ("global_ratio", "nearest_weight", "kappa") for bad in (-0.01, 1.01)),
        *((name, bad) for name in ("epsilon", "temporal_sigma") for bad in (0, 0.0, -1.0)),
        *((name, -1e-9) for name in ("tolerance", "spatial_weight", "mass")),
        *((name, bad) for name in ("window", "iterations", "clips") for bad in (0, -1, 2.0)),
        ("local_layer", 5.0),
        ("emit", "twice"),
        ("emit", None),
        ("emit", ["both"]),
        ("anchors", "random"),
        ("anchors", None),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(SettingError, match=name):
        AOTConfig(**{name: value})


def test_the_message_gives_the_allowed_range():
    with pytest.raises(SettingError, match=r"^kappa must be in \[0, 1\], got 1.5$"):
        AOTConfig(kappa=1.5)
    with pytest.raises(SettingError, match=r"^epsilon must be a finite number above 0, got 0$"):
        AOTConfig(epsilon=0)
    with pytest.raises(SettingError, match=r"^clips must be an integer of at least 1, got 0$"):
        AOTConfig(clips=0)


def test_the_ends_of_closed_ranges_are_allowed():
    lowest = {"global_ratio": 0, "nearest_weight": 0, "kappa": 0, "tolerance": 0, "spatial_weight": 0, "mass": 0}
    highest = {"global_ratio": 1, "nearest_weight": 1, "kappa": 1}
    for ends in (lowest | {"window": 1, "clips": 1}, highest):
        assert AOTConfig(**ends).settings().items() >= ends.items()


def test_unknown_keys_are_named_together_with_the_allowed_ones():
    with pytest.raises(SettingError) as error:
        AOTConfig.from_mapping({"kapa": 0.3, "clips": 4, 7: 1})
    message = str(error.value)
    assert "kapa, 7" in message
    assert all(field.name in message for field in dataclasses.fields(AOTConfig))


@pytest.mark.parametrize("value", [None, [("clips", 4)], "clips=4", 3])
def test_settings_that_are_not_a_mapping_are_refused(value):
    with pytest.raises(SettingError, match="mapping"):
        AOTConfig.from_mapping(value)


def test_a_mapping_overrides_only_what_it_names():
    assert AOTConfig.from_mapping({"kappa": 0.5, "clips": 4}) == AOTConfig(kappa=0.5, clips=4)
    assert AOTConfig.from_mapping({}) == AOTConfig()
    assert AOTConfig.from_mapping(AOTConfig(kappa=0.2).in_effect()) == AOTConfig(kappa=0.2)


def test_settings_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AOTConfig().clips = 3
    with pytest.raises(TypeError):
        AOTConfig(0.5)


def test_numbers_of_any_type_have_one_digest():
    one, other = (AOTConfig(mass=1, clips=number(9), kappa=0) for number in (int, np.int64))
    assert one.digest() == other.digest() == AOTConfig(mass=1.0, clips=9, kappa=0.0).digest()
    assert len(one.digest()) == 16


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 0.0, -0.1, 1.5, 1.0000001])
def test_a_retention_outside_its_range_is_refused(value):
    with pytest.raises(SettingError, match=r"^retention must be in \(0, 1\], got "):
        check_retention(value)
    with pytest.raises(SettingError):
        quantise_retention(value)


@pytest.mark.parametrize("value", [1, 1.0, 1e-9, np.float32(0.5)])
def test_a_retention_inside_its_range_is_a_float(value):
    assert check_retention(value) == value
    assert type(check_retention(value)) is float


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1e-9, 0.01), (0.014, 0.01), (0.016, 0.02), (0.1, 0.1), (0.29, 0.29), (0.994, 0.99), (1, 1.0)],
)
def test_a_requested_retention_is_rounded_to_hundredths_but_never_to_0(value, expected):
    assert quantise_retention(value) == expected


def test_errors_share_a_base_and_stay_ordinary_value_errors():
    assert issubclass(SettingError, AOTError)
    assert issubclass(SettingError, ValueError)
