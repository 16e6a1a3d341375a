"""The operator's settings, parsed once from AOT_GATEWAY_* variables into a frozen object."""

import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yarl
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.errors import ConfigurationError

PREFIX = "AOT_GATEWAY_"
MIB = 2**20


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return value


def _check_engines(urls: tuple[str, ...]) -> tuple[str, ...]:
    if not urls:
        raise ValueError("must name at least one engine, like http://127.0.0.1:8000")
    if len(set(urls)) != len(urls):
        raise ValueError("must not name an engine twice")
    for url in urls:
        try:
            parsed = yarl.URL(url)
        except ValueError:
            parsed = yarl.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.user or parsed.query_string:
            raise ValueError("must be base URLs like http://127.0.0.1:8000")
        if parsed.path.rstrip("/").endswith("/v1"):
            raise ValueError("must be base URLs without the /v1")
    return tuple(url.rstrip("/") for url in urls)


def _check_domains(hosts: tuple[str, ...]) -> tuple[str, ...]:
    hosts = _check_hosts(hosts)
    if any(yarl.URL(f"http://{host}").explicit_port is not None for host in hosts):
        raise ValueError("must be a list of hosts, without ports")
    return hosts


def _check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    for host in hosts:
        try:
            parsed = yarl.URL(f"http://{host}")
            fits = parsed.raw_authority == host.lower() and bool(parsed.host) and not parsed.user
        except ValueError:
            fits = False
        if not fits:
            raise ValueError("must be a list of host or host:port, without scheme and path")
    return tuple(host.lower() for host in hosts)


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        try:
            fits = origin == "*" or str(yarl.URL(origin).origin()) == origin.lower()
        except ValueError:
            fits = False
        if not fits or not origin.startswith(("http://", "https://", "*")):
            raise ValueError("must be a list of origins like https://app.example.com, without paths, or *")
    return tuple(origin.lower() for origin in origins)


def _check_limits_backend(backend: SecretStr) -> SecretStr:
    value = backend.get_secret_value()
    try:
        is_redis = yarl.URL(value).scheme in ("redis", "rediss") and bool(yarl.URL(value).host)
    except ValueError:
        is_redis = False
    if value != "memory" and not is_redis:
        raise ValueError("must be memory, redis://host:port/db or rediss://host:port/db")
    return backend


def _check_directory(name: str, directory: Path) -> None:
    if not directory.is_absolute() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ValueError(f"{PREFIX}{name} must be the absolute path of a writable directory, got '{directory}'")


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """All settings. Each field is read from the environment variable AOT_GATEWAY_<NAME>."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    engines: Annotated[Names, AfterValidator(_check_engines)] = ("http://127.0.0.1:8000",)
    config: Path | None = None
    allow_open: bool = False

    cors_origins: Annotated[Names, AfterValidator(_check_origins)] = ()
    limits_backend: Annotated[SecretStr, AfterValidator(_check_limits_backend)] = SecretStr("memory")
    usage_days: int = Field(default=92, ge=1, le=3660)
    max_body_bytes: int = Field(default=96 * MIB, ge=1024)
    body_seconds: float = Field(default=120, gt=0)
    max_buffered_bytes: int = Field(default=1024 * MIB, ge=1024)
    max_concurrency: int = Field(default=128, ge=1)
    max_queue: int = Field(default=256, ge=0)
    queue_seconds: float = Field(default=60, gt=0)
    drain_seconds: float = Field(default=30, ge=0)
    max_choices: int = Field(default=16, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    chat_template_kwargs: Names = ("enable_thinking",)

    engine_key_file: Path | None = None
    engine_connect_seconds: float = Field(default=5, gt=0)
    engine_headers_seconds: float = Field(default=120, gt=0)
    engine_read_seconds: float = Field(default=600, gt=0)
    engine_health_seconds: float = Field(default=5, gt=0)
    llm_d_headers: bool = False

    media_handoff: Literal["inline", "file"] = "inline"
    media_dir: Path | None = None
    media_allow_hosts: Annotated[Names, AfterValidator(_check_hosts)] = ()
    media_deny_hosts: Annotated[Names, AfterValidator(_check_domains)] = ()
    media_only_hosts: Annotated[Names, AfterValidator(_check_domains)] = ()
    media_allow_http: bool = False
    media_max_bytes: int = Field(default=64 * MIB, ge=1024)
    media_max_seconds: float = Field(default=600, gt=0)
    media_max_pixels: int = Field(default=4096 * 2304, ge=1)
    media_max_frames: int = Field(default=100_000, ge=1)
    media_sampled_frames: int = Field(default=32, ge=1)
    media_max_decoded_bytes: int = Field(default=640 * MIB, ge=1024)  # vLLM 0.33 takes 716 MB in a request
    media_full_size: bool = False
    media_fetch_seconds: float = Field(default=30, gt=0)
    media_read_seconds: float = Field(default=30, gt=0)
    media_readers: int | None = Field(default=None, ge=1)
    media_store_bytes: int = Field(default=10_240 * MIB, ge=1024)
    media_store_seconds: float = Field(default=3600, gt=0)
    media_secret: SecretStr | None = Field(default=None, min_length=16)

    files_dir: Path | None = None
    files_tenant_bytes: int = Field(default=10_240 * MIB, ge=1024)

    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _check_buffers(self) -> Self:
        encoded = (self.media_max_bytes + 2) // 3 * 4
        for name, size_bytes in (("MAX_BODY_BYTES", self.max_body_bytes), ("MEDIA_MAX_BYTES in base64", encoded)):
            if self.max_buffered_bytes < size_bytes:
                raise ValueError(
                    f"{PREFIX}MAX_BUFFERED_BYTES must be at least {PREFIX}{name} ({size_bytes}), "
                    f"got {self.max_buffered_bytes}"
                )
        return self

    @model_validator(mode="after")
    def _check_store(self) -> Self:
        if self.media_handoff == "file":
            if self.media_dir is None:
                raise ValueError(f"{PREFIX}MEDIA_DIR must be set when {PREFIX}MEDIA_HANDOFF is 'file'")
            _check_directory("MEDIA_DIR", self.media_dir)
            if self.media_store_bytes < self.media_max_bytes:
                raise ValueError(
                    f"{PREFIX}MEDIA_STORE_BYTES must be at least {PREFIX}MEDIA_MAX_BYTES ({self.media_max_bytes}), "
                    f"got {self.media_store_bytes}"
                )
        return self

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if self.files_dir is not None:
            _check_directory("FILES_DIR", self.files_dir)
            if self.media_dir is not None and self.files_dir.resolve().is_relative_to(self.media_dir.resolve()):
                raise ValueError(f"{PREFIX}FILES_DIR must not lie in {PREFIX}MEDIA_DIR, which engines read")
        return self

    @classmethod
    def from_environment(cls) -> Self:
        """Return the settings in the process's environment.

        Raises ConfigurationError, with one line for each wrong setting.
        """
        refuse_unknown_names(os.environ)
        try:
            return cls()
        except ValidationError as exc:
            raise ConfigurationError("\n".join(_explain(error) for error in exc.errors())) from exc

    @property
    def is_loopback(self) -> bool:
        """Whether the gateway listens on loopback only, so that no other machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def refuse_unknown_names(environ: Mapping[str, str]) -> None:
    """Raise ConfigurationError if `environ` has a name with the prefix AOT_GATEWAY_ that is not a setting."""
    short = [name.upper() for name in Settings.model_fields]
    known = [PREFIX + name for name in short]
    complaints = []
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), short, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(PREFIX + n for n in near)}?" if near else f"it has {', '.join(known)}"
            complaints.append(f"{name} is not a setting of the gateway; {hint}")
    if complaints:
        raise ConfigurationError("\n".join(complaints))


def traces_are_exported() -> bool:
    """Return whether OpenTelemetry's own variables (OTEL_*) name an endpoint for spans and do not disable tracing."""
    environ = os.environ
    named = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    return bool(named) and not is_off


def _explain(error: Any) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = PREFIX + str(error["loc"][0]).upper()
    rule = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should ")
    rule = rule if rule.startswith("must ") else f"must {rule}"
    annotation = Settings.model_fields[str(error["loc"][0])].annotation
    if SecretStr in (annotation, *get_args(annotation)):
        return f"{name} {rule}"
    value = error["input"] if isinstance(error["input"], str) else ",".join(map(str, error["input"]))
    return f"{name} {rule}, got '{value}'"
