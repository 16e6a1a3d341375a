import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aliases import Alias, load_aliases
from server.errors import ConfigurationError, RetentionRefused

hundredths = st.integers(1, 100).map(lambda n: n / 100)


@given(
    st.lists(hundredths, min_size=2, max_size=2).map(sorted),
    st.floats(allow_nan=False, min_value=-2, max_value=3) | hundredths,
)
def test_a_retention_is_taken_exactly_if_it_is_inside_the_bounds_and_never_leaves_them(bounds, asked):
    low, high = bounds
    alias = Alias("a", "m", None, low, high)
    if low <= asked <= high:
        given_ = alias.retention_for(asked)
        assert low <= given_ <= high
        assert abs(given_ - asked) <= 0.005 + 1e-12
        assert given_ == round(given_, 2)
    else:
        with pytest.raises(RetentionRefused):
            alias.retention_for(asked)


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_without_bounds_everything_above_0_up_to_1_is_taken(asked):
    assert 0.01 <= Alias("a", "m").retention_for(asked) <= 1


@pytest.mark.parametrize("asked", [0.0, -0.1, 1.0001])
def test_without_bounds_everything_else_is_refused(asked):
    with pytest.raises(RetentionRefused, match=r"\(0, 1\]"):
        Alias("a", "m").retention_for(asked)


def test_what_is_not_asked_is_the_default_of_the_alias():
    assert Alias("a", "m", 0.1, 0.05, 0.5).retention_for(None) == 0.1
    assert Alias("a", "m").retention_for(None) is None


def test_a_file_gives_its_aliases(tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "models:\n"
        "  llava-fast: {engine_model: llava, retention: 0.10, min_retention: 0.05, max_retention: 0.5}\n"
        "  llava: {engine_model: llava}\n"
    )
    assert load_aliases(path) == {
        "llava-fast": Alias("llava-fast", "llava", 0.1, 0.05, 0.5),
        "llava": Alias("llava", "llava", None, 0.0, 1.0),
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("models: {a: {engine_model: m, retension: 0.1}}", "models.a.retension: unknown key"),
        ("models: {a: {engine_model: m}}\nkeys: []", "keys: unknown key"),
        ("models: {a: {retention: 0.1}}", "models.a.engine_model: field required"),
        ("models: {a: {engine_model: m, retention: 0}}", "models.a.retention: input should be greater"),
        ("models: {a: {engine_model: m, retention: 1.5}}", "models.a.retention: input should be less"),
        ("models: {a: {engine_model: m, retention: .nan}}", "models.a.retention: "),
        ("models: {a: {engine_model: m, retention: true}}", "models.a.retention: "),
        ("models: {a: {engine_model: m, retention: '0.1'}}", "models.a.retention: "),
        ("models: {a: {engine_model: m, retention: 0.123}}", "models.a.retention: must have at most two decimals"),
        (
            "models: {a: {engine_model: m, min_retention: 0.5, max_retention: 0.2}}",
            "models.a: min_retention must not be above max_retention, got 0.5 and 0.2",
        ),
        (
            "models: {a: {engine_model: m, retention: 0.1, min_retention: 0.5}}",
            "models.a: retention must be in [0.5, 1], got 0.1",
        ),
        ("models: {}", "models: "),
        ("", "the file: "),
        ("models: [", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_naming_file_and_key(text, complaint, tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_aliases(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    assert complaint in str(caught.value)


def test_a_missing_file_is_refused_naming_it(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.yaml: can't be read"):
        load_aliases(tmp_path / "none.yaml")
