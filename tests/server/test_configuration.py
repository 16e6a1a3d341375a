from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from server.aliases import Alias
from server.configuration import Configuration, Key, Limits, load
from server.errors import ConfigurationError
from tests.server.harness import gateway

HASH = "0f" * 32


def test_a_file_gives_its_aliases(tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "models:\n"
        "  llava-fast: {engine_model: llava, retention: 0.10, min_retention: 0.05, max_retention: 0.5}\n"
        "  llava: {engine_model: llava}\n"
    )
    assert load(path).aliases == {
        "llava-fast": Alias("llava-fast", "llava", 0.1, 0.05, 0.5),
        "llava": Alias("llava", "llava", None, 0.0, 1.0),
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("models: {a: {engine_model: m, retension: 0.1}}", "models.a.retension: unknown key"),
        ("models: {a: {engine_model: m}}\nkeys: []", "keys: unknown key"),
        (f"tenants: {{Acme Inc.: {{keys: [{{sha256: {HASH}}}]}}}}", "tenants.Acme Inc.: "),
        ("tenants: {acme: {keys: []}}", "tenants.acme.keys: "),
        ("tenants: {}", "tenants: "),
        ("tenants: {acme: {keys: [{sha256: sk-aot-secret}]}}", "tenants.acme.keys.0.sha256: must be a key's SHA-256"),
        (f"tenants: {{acme: {{keys: [{{sha256: {HASH}, expires: soon}}]}}}}", "tenants.acme.keys.0.expires: "),
        (
            f"tenants: {{acme: {{keys: [{{sha256: {HASH}, expires: 2030-01-01 12:00:00}}]}}}}",
            "tenants.acme.keys.0.expires: input should have timezone info",
        ),
        (
            f"tenants: {{a: {{keys: [{{sha256: {HASH}}}, {{sha256: {HASH}}}]}}}}",
            "the same key must not be listed twice",
        ),
        (
            f"models: {{m: {{engine_model: m}}}}\ntenants: {{a: {{keys: [{{sha256: {HASH}}}], models: [gpt-9]}}}}",
            "tenants.a.models: must be among the models of the file, got 'gpt-9'",
        ),
        ("limits: {requests_per_minute: 0}", "limits.requests_per_minute: input should be greater than or equal to 1"),
        ("limits: {requests_per_minute: 1.5}", "limits.requests_per_minute: input should be a valid integer"),
        ("models: {a: {retention: 0.1}}", "models.a.engine_model: field required"),
        ("models: {a: {engine_model: m, retention: 0}}", "models.a.retention: input should be greater"),
        ("models: {a: {engine_model: m, retention: 1.5}}", "models.a.retention: input should be less"),
        ("models: {a: {engine_model: m, retention: .nan}}", "models.a.retention: "),
        ("models: {a: {engine_model: m, retention: true}}", "models.a.retention: "),
        ("models: {a: {engine_model: m, retention: '0.1'}}", "models.a.retention: "),
        ("models: {a: {engine_model: m, preset: 'AOT whole'}}", "models.a.preset: string should match pattern"),
        ("models: {a: {engine_model: m, preset: [paper]}}", "models.a.preset: "),
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
        load(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    assert complaint in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_file_is_refused_naming_it(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.yaml: can't be read"):
        load(tmp_path / "none.yaml")


def test_what_is_no_yaml_is_not_quoted(tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text("tenants:\n  - sk-aot-secret: [\n")
    with pytest.raises(ConfigurationError, match=r"is not YAML \(line \d\)$"):
        load(path)


def test_a_tenant_without_limits_of_its_own_gets_those_of_the_file_and_so_does_an_open_gateway():
    configuration = Configuration.model_validate(
        {
            "tenants": {
                "plain": {"keys": [{"sha256": HASH}]},
                "special": {"keys": [{"sha256": HASH[::-1]}], "limits": {"tokens_per_minute": 7}},
            },
            "limits": {"requests_per_minute": 5},
        }
    )
    assert configuration.limits_of("plain") == Limits(requests_per_minute=5)
    assert configuration.limits_of("special") == Limits(tokens_per_minute=7)
    assert Configuration(limits=Limits(requests_per_minute=5)).limits_of("") == Limits(requests_per_minute=5)


@pytest.mark.parametrize(
    ("expires", "moment", "valid"),
    [
        (None, datetime(2999, 1, 1, tzinfo=UTC), True),
        (date(2030, 1, 1), datetime(2029, 12, 31, 23, 59, 59, tzinfo=UTC), True),
        (date(2030, 1, 1), datetime(2030, 1, 1, tzinfo=UTC), False),
        (
            datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))),
            datetime(2029, 12, 31, 23, 59, tzinfo=UTC),
            True,
        ),
        (datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), datetime(2030, 1, 1, tzinfo=UTC), False),
    ],
)
def test_a_key_is_valid_until_it_expires(expires, moment, valid):
    assert Key(sha256=HASH, expires=expires).is_valid_at(moment) is valid


def test_hashes_are_not_shown():
    assert HASH not in repr(Key(sha256=HASH))


def test_keys_that_open_nothing_are_named_with_the_reason():
    keys = [{"sha256": "0" * 64}, {"sha256": "a" * 64, "expires": date(2026, 1, 1)}, {"sha256": "b" * 64}]
    empty = {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    config = Configuration.model_validate({"tenants": {"acme": {"keys": keys}}, "metrics_keys": [empty]})
    assert config.useless_keys(datetime(2025, 12, 31, tzinfo=UTC)) == [
        "tenants.acme.keys[0]: the sha256 of zeros stands for no key; python -m server.keys makes one",
        "metrics_keys[0]: this is the sha256 of nothing, which is no key",
    ]
    assert config.useless_keys(datetime(2026, 1, 1, tzinfo=UTC))[1:2] == [
        "tenants.acme.keys[1]: the key has expired (2026-01-01)"
    ]
    assert Configuration().useless_keys(datetime(2026, 1, 1, tzinfo=UTC)) == []


async def test_a_gateway_says_at_its_start_which_keys_open_nothing(engine, tmp_path, caplog):
    file = tmp_path / "gateway.yaml"
    file.write_text(f"tenants: {{acme: {{keys: [{{sha256: '{'0' * 64}'}}]}}}}", encoding="utf-8")
    async with gateway(engine, config=file):
        pass
    told = [record.getMessage() for record in caplog.records if "opens nothing" in record.getMessage()]
    assert told == [
        "a key of the configuration file opens nothing: tenants.acme.keys[0]: the sha256 of zeros stands for no key; "
        "python -m server.keys makes one"
    ]
