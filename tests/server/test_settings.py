import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from server.errors import ConfigurationError
from server.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


GOOD = {
    "HOST": ("0.0.0.0", "0.0.0.0"),
    "PORT": ("9000", 9000),
    "ENGINES": ("http://a:8000/, http://b:8001", ("http://a:8000", "http://b:8001")),
    "CONFIG": ("/etc/aot.yaml", Path("/etc/aot.yaml")),
    "ALLOW_OPEN": ("true", True),
    "LIMITS_BACKEND": ("redis://:s3cret@cache:6379/1", SecretStr("redis://:s3cret@cache:6379/1")),
    "CORS_ORIGINS": (
        "https://App.Example.com, http://localhost:3000",
        ("https://app.example.com", "http://localhost:3000"),
    ),
    "USAGE_DAYS": ("7", 7),
    "MAX_BODY_BYTES": ("4096", 4096),
    "BODY_SECONDS": ("3", 3.0),
    "MAX_BUFFERED_BYTES": ("200000000", 200_000_000),
    "MAX_CONCURRENCY": ("3", 3),
    "MAX_QUEUE": ("0", 0),
    "QUEUE_SECONDS": ("0.5", 0.5),
    "MAX_CHOICES": ("2", 2),
    "MAX_OUTPUT_TOKENS": ("512", 512),
    "DRAIN_SECONDS": ("1.5", 1.5),
    "CHAT_TEMPLATE_KWARGS": ("enable_thinking,add_vision_id", ("enable_thinking", "add_vision_id")),
    "ENGINE_KEY_FILE": ("/run/secrets/engine", Path("/run/secrets/engine")),
    "ENGINE_CONNECT_SECONDS": ("2", 2.0),
    "ENGINE_HEADERS_SECONDS": ("30", 30.0),
    "ENGINE_READ_SECONDS": ("60", 60.0),
    "ENGINE_HEALTH_SECONDS": ("0.5", 0.5),
    "LLM_D_HEADERS": ("true", True),
    "MEDIA_HANDOFF": ("inline", "inline"),
    "MEDIA_DIR": ("/tmp", Path("/tmp")),
    "MEDIA_ALLOW_HOSTS": ("Media.Example,10.0.0.7:8443", ("media.example", "10.0.0.7:8443")),
    "MEDIA_ALLOW_HTTP": ("true", True),
    "MEDIA_DENY_HOSTS": ("Evil.Example", ("evil.example",)),
    "MEDIA_ONLY_HOSTS": ("media.example,10.0.0.7", ("media.example", "10.0.0.7")),
    "MEDIA_MAX_PIXELS": ("100", 100),
    "MEDIA_MAX_FRAMES": ("100", 100),
    "MEDIA_SAMPLED_FRAMES": ("100", 100),
    "MEDIA_MAX_DECODED_BYTES": ("2048", 2048),
    "MEDIA_SECRET": ("0123456789abcdef", SecretStr("0123456789abcdef")),
    "MEDIA_MAX_BYTES": ("2048", 2048),
    "MEDIA_MAX_SECONDS": ("12.5", 12.5),
    "MEDIA_FETCH_SECONDS": ("3", 3.0),
    "MEDIA_READ_SECONDS": ("4", 4.0),
    "MEDIA_READERS": ("7", 7),
    "MEDIA_FULL_SIZE": ("true", True),
    "MEDIA_STORE_BYTES": ("100000", 100_000),
    "MEDIA_STORE_SECONDS": ("60", 60.0),
    "FILES_DIR": ("/var/tmp", Path("/var/tmp")),
    "FILES_TENANT_BYTES": ("4096", 4096),
    "LOG_LEVEL": ("debug", "debug"),
}


def test_the_table_here_has_every_setting():
    assert set(GOOD) == {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("name", GOOD)
def test_each_setting_is_read_from_its_variable(name, monkeypatch):
    text, value = GOOD[name]
    monkeypatch.setenv(PREFIX + name, text)
    settings = Settings.from_environment()
    assert getattr(settings, name.lower()) == value
    untouched = {k: v for k, v in settings if k != name.lower()}
    monkeypatch.delenv(PREFIX + name)
    assert {k: v for k, v in Settings.from_environment() if k != name.lower()} == untouched


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("PORT", "http", "integer"),
        ("PORT", "70000", "65535"),
        ("ENGINES", "localhost:8000", "http://127.0.0.1:8000"),
        ("ENGINES", "http://a:1/v1", "without the /v1"),
        ("ENGINES", "http://a:1,http://a:1", "twice"),
        ("ENGINES", ",", "at least one"),
        ("MAX_QUEUE", "-1", "greater than or equal to 0"),
        ("MEDIA_HANDOFF", "carrier", "'inline' or 'file'"),
        ("MEDIA_ALLOW_HTTP", "perhaps", "boolean"),
        ("MEDIA_ALLOW_HOSTS", "https://a", "host or host:port"),
        ("MEDIA_ALLOW_HOSTS", "user@a", "host or host:port"),
        ("MEDIA_DENY_HOSTS", "a:80", "without ports"),
        ("MEDIA_ONLY_HOSTS", "https://a", "host or host:port"),
        ("MEDIA_MAX_SECONDS", "0", "greater than 0"),
        ("DRAIN_SECONDS", "soon", "number"),
        ("CORS_ORIGINS", "app.example.com", "https://app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com/", "without paths"),
        ("CORS_ORIGINS", "https://*.example.com/a", "without paths"),
        ("CORS_ORIGINS", "file:///a", "without paths"),
    ],
)
def test_a_bad_value_stops_the_start_naming_setting_value_and_what_is_allowed(name, text, allowed, monkeypatch):
    monkeypatch.setenv(PREFIX + name, text)
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment()
    message = str(caught.value)
    assert message.startswith(PREFIX + name)
    assert allowed in message
    assert text in message or text == ","


@pytest.mark.parametrize("text", ["rdis://:s3cret@cache", "redis://:s3cret@", "s3cret", "redis://:s3cret@[::1"])
def test_a_bad_backend_for_limits_is_not_quoted_as_it_may_hold_a_password(text, monkeypatch):
    monkeypatch.setenv("AOT_GATEWAY_LIMITS_BACKEND", text)
    with pytest.raises(ConfigurationError, match="AOT_GATEWAY_LIMITS_BACKEND must be memory, redis://") as caught:
        Settings.from_environment()
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("AOT_GATEWAY_LIMITS_BACKEND", "redis://:s3cret@cache")
    assert "s3cret" not in repr(Settings.from_environment())


@pytest.mark.parametrize("directory", [None, "relative", "/does/not/exist"])
def test_file_hand_over_needs_a_writable_directory(directory, monkeypatch):
    monkeypatch.setenv("AOT_GATEWAY_MEDIA_HANDOFF", "file")
    if directory:
        monkeypatch.setenv("AOT_GATEWAY_MEDIA_DIR", directory)
    with pytest.raises(ConfigurationError, match="AOT_GATEWAY_MEDIA_DIR must be"):
        Settings.from_environment()


def test_a_store_smaller_than_one_video_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("AOT_GATEWAY_MEDIA_HANDOFF", "file")
    monkeypatch.setenv("AOT_GATEWAY_MEDIA_DIR", str(tmp_path))
    monkeypatch.setenv("AOT_GATEWAY_MEDIA_STORE_BYTES", "2048")
    with pytest.raises(ConfigurationError, match="AOT_GATEWAY_MEDIA_STORE_BYTES must be at least"):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_buffered_bytes": 2**20}, r"AOT_GATEWAY_MAX_BODY_BYTES \(100663296\), got 1048576"),
        (
            {"max_buffered_bytes": 2**20, "max_body_bytes": 2**20},
            r"AOT_GATEWAY_MEDIA_MAX_BYTES in base64 \(89478488\), got 1048576",
        ),
    ],
)
def test_less_memory_than_one_request_may_take_is_refused(settings, says):
    with pytest.raises(ValidationError, match=f"AOT_GATEWAY_MAX_BUFFERED_BYTES must be at least {says}"):
        Settings(**settings)


def test_a_secret_that_is_too_short_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv("AOT_GATEWAY_MEDIA_SECRET", "hunter2")
    with pytest.raises(ConfigurationError, match=r"AOT_GATEWAY_MEDIA_SECRET must .* 16") as caught:
        Settings.from_environment()
    assert "hunter2" not in str(caught.value)
    assert "0123456789abcdef" not in repr(Settings(media_secret="0123456789abcdef"))


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    monkeypatch.setenv("AOT_GATEWAY_PORT", "")
    assert Settings.from_environment().port == 8080


def test_an_unknown_name_stops_the_start_and_the_nearest_names_are_offered(monkeypatch):
    monkeypatch.setenv("AOT_GATEWAY_MAX_QUEU", "3")
    with pytest.raises(ConfigurationError, match=r"AOT_GATEWAY_MAX_QUEU is not .* AOT_GATEWAY_MAX_QUEUE"):
        Settings.from_environment()


def test_a_name_like_no_other_gets_the_whole_list(monkeypatch):
    monkeypatch.setenv("AOT_GATEWAY_ZZZZZZZZZZZZZZZZZZZ", "3")
    with pytest.raises(ConfigurationError, match="it has AOT_GATEWAY_HOST, AOT_GATEWAY_PORT"):
        Settings.from_environment()


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("gateway", False)],
)
def test_loopback_is_recognised(host, loopback):
    assert Settings(host=host).is_loopback is loopback


@pytest.mark.parametrize(
    "environment",
    [
        {"AOT_GATEWAY_PORT": "x"},
        {"AOT_GATEWAY_PROT": "1"},
        {"AOT_GATEWAY_CONFIG": "/no/such.yaml"},
        {"AOT_GATEWAY_ENGINE_KEY_FILE": "/no/such.key"},
        {"AOT_GATEWAY_HOST": "0.0.0.0"},
    ],
)
def test_the_process_ends_with_code_2_and_a_readable_message(environment):
    ended = subprocess.run(
        [sys.executable, "-m", "server"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("The gateway can't start:\n")
    assert next(iter(environment.values())) in ended.stderr or next(iter(environment)) in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("directory", ["relative", "/does/not/exist"])
def test_files_need_a_writable_directory(directory, monkeypatch):
    monkeypatch.setenv("AOT_GATEWAY_FILES_DIR", directory)
    with pytest.raises(ConfigurationError, match="AOT_GATEWAY_FILES_DIR must be"):
        Settings.from_environment()


def test_files_must_not_lie_where_engines_read(monkeypatch, tmp_path):
    (tmp_path / "files").mkdir()
    monkeypatch.setenv("AOT_GATEWAY_MEDIA_DIR", str(tmp_path))
    monkeypatch.setenv("AOT_GATEWAY_FILES_DIR", str(tmp_path / "files"))
    with pytest.raises(ConfigurationError, match="AOT_GATEWAY_FILES_DIR must not lie in AOT_GATEWAY_MEDIA_DIR"):
        Settings.from_environment()
