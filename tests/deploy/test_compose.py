"""compose.yaml: valid, complete, closed to the outside, and understood by those it starts."""

import json
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from server import configuration
from server.app import create_app
from server.settings import Settings
from tests.deploy.files import COMPOSE, ROOT, VARIABLE, composed, environment_of, example_variables

EXAMPLE = composed(**example_variables())
SERVICES = EXAMPLE["services"]
ENGINES = ["engine", "engine-cpu"]
STATE = "/var/lib/aot"


def seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration[:-1])


def flags(engine: str) -> dict[str, str]:
    return dict(flag.split("=", 1) for flag in SERVICES[engine]["command"] if flag.startswith("--") and "=" in flag)


def test_it_is_valid_by_the_schema_of_compose():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_example_of_variables_has_all_that_compose_reads_and_nothing_else():
    used = {match["name"] for match in VARIABLE.finditer(COMPOSE)}
    assert set(example_variables()) == {*used, "COMPOSE_PROFILES"}  # the latter is read by Compose itself
    assert COMPOSE.count("${") == len(list(VARIABLE.finditer(COMPOSE)))


def test_where_a_variable_may_be_left_out_the_example_shows_what_holds_then():
    required = {match["name"] for match in VARIABLE.finditer(COMPOSE) if match["kind"] == ":?"}
    assert required == {"AOT_MODEL"}
    assert composed(AOT_MODEL=example_variables()["AOT_MODEL"]) == EXAMPLE


def test_each_profile_has_one_engine_under_the_name_that_the_gateway_asks():
    assert SERVICES["gateway"]["environment"]["AOT_GATEWAY_ENGINES"] == "http://engine:8000"
    assert {name: SERVICES[name]["profiles"] for name in ENGINES} == {"engine": ["gpu"], "engine-cpu": ["cpu"]}
    assert SERVICES["engine"]["networks"] == ["engines"]
    assert SERVICES["engine-cpu"]["networks"] == {"engines": {"aliases": ["engine"]}}
    assert set(example_variables()["COMPOSE_PROFILES"].split(",")) == {"gpu", "monitoring"}


def test_only_the_gateway_and_grafana_are_published_and_by_default_to_this_host():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"gateway", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


@pytest.mark.parametrize("name", [*ENGINES, "prometheus"])
def test_what_is_not_published_has_no_way_out_either(name):
    assert all(EXAMPLE["networks"][network]["internal"] for network in SERVICES[name]["networks"])


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_services_start_again_and_can_gain_no_rights(name):
    service = SERVICES[name]
    assert service["restart"] == ("no" if name == "model" else "unless-stopped")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
    assert "docker.sock" not in json.dumps(service)


def test_the_gateway_writes_to_its_volumes_and_to_memory_only():
    gateway = SERVICES["gateway"]
    assert gateway["read_only"] is True
    assert gateway["tmpfs"] == ["/tmp:size=64m,mode=1777"]
    *given, media, files = gateway["volumes"]
    assert [media, files] == [f"media:{STATE}/media", f"files:{STATE}/files"]
    assert all(volume["type"] == "bind" and volume["read_only"] for volume in given)


def test_the_configuration_is_mounted_with_its_directory_so_that_a_file_that_replaces_it_is_seen():
    (given,) = [volume for volume in SERVICES["gateway"]["volumes"] if isinstance(volume, dict)]
    path = PurePosixPath(SERVICES["gateway"]["environment"]["AOT_GATEWAY_CONFIG"])
    assert given["target"] == str(path.parent)
    assert given["source"] == "./config"
    assert given["bind"] == {"create_host_path": False}  # a directory that is missing is an error, not an empty one


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_read_the_media_where_the_gateway_writes_them_and_nothing_else_of_its(engine):
    shared = SERVICES["gateway"]["environment"]["AOT_GATEWAY_MEDIA_DIR"]
    assert flags(engine)["--allowed-local-media-path"] == shared
    assert f"media:{shared}:ro" in SERVICES[engine]["volumes"]
    assert not any(volume.startswith("files:") for volume in SERVICES[engine]["volumes"])


def test_the_model_is_downloaded_by_a_service_with_a_way_out_before_the_engine_reads_it():
    model, engine = SERVICES["model"], SERVICES["engine"]
    cache = "models:/home/vllm/.cache/huggingface"
    assert cache in model["volumes"]
    assert f"{cache}:ro" in engine["volumes"]
    assert model["command"] == engine["command"][:1]
    assert model["environment"]["HF_HUB_OFFLINE"] == "0"
    assert "HF_HUB_OFFLINE" not in engine["environment"]  # the image's holds
    assert engine["depends_on"] == {"model": {"condition": "service_completed_successfully"}}


def test_the_gateway_starts_after_its_engine_and_is_given_time_to_drain():
    gateway = SERVICES["gateway"]
    assert gateway["depends_on"] == {name: {"condition": "service_healthy", "required": False} for name in ENGINES}
    drain = float(gateway["environment"]["AOT_GATEWAY_DRAIN_SECONDS"])
    assert seconds(gateway["stop_grace_period"]) > drain
    for engine in ENGINES:
        assert seconds(SERVICES[engine]["stop_grace_period"]) > int(flags(engine)["--shutdown-timeout"]) > drain


def test_the_engine_takes_as_many_gpus_as_it_is_split_over():
    services = composed(AOT_MODEL="m", AOT_GPUS="4")["services"]
    (devices,) = services["engine"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "4", "capabilities": ["gpu"]}
    assert "--tensor-parallel-size=4" in services["engine"]["command"]


def test_memory_is_set_aside_and_the_gateways_is_bounded():
    resources = {name: SERVICES[name]["deploy"]["resources"] for name in ("gateway", "engine-cpu")}
    assert all(resource["reservations"]["memory"] for resource in resources.values())
    assert resources["gateway"]["limits"]["memory"] == "4g"


def test_grafana_starts_after_a_prometheus_that_answers():
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    assert all("healthcheck" in SERVICES[name] for name in ("prometheus", "grafana"))


def test_keys_come_from_files_that_only_who_needs_them_sees():
    seen = {name: set(service.get("secrets", ())) for name, service in SERVICES.items()}
    assert seen == {
        "model": {"hf_token"},
        "engine": {"engine_key"},
        "engine-cpu": {"engine_key"},
        "gateway": {"engine_key"},
        "prometheus": {"metrics_key"},
        "grafana": {"grafana_password"},
    }
    assert set().union(*seen.values()) == set(EXAMPLE["secrets"])
    for name, service in SERVICES.items():
        named = [value for value in service.get("environment", {}).values() if value.startswith("/run/secrets/")]
        assert {value.removeprefix("/run/secrets/") for value in named} <= seen[name]


def test_the_gateway_takes_its_settings_and_the_example_configuration(tmp_path, monkeypatch):
    for name in ("media", "files"):
        (tmp_path / name).mkdir()
    (tmp_path / "engine_key").write_text("sk-engine\n")
    image = environment_of(ROOT / "docker" / "gateway.Dockerfile")
    ours = {**image, **SERVICES["gateway"]["environment"]}
    for name, value in ours.items():
        if name.startswith("AOT_GATEWAY_"):
            monkeypatch.setenv(name, value.replace(STATE, str(tmp_path)).replace("/run/secrets", str(tmp_path)))
    monkeypatch.setenv("AOT_GATEWAY_CONFIG", str(ROOT / "docker" / "gateway.example.yaml"))
    settings = Settings.from_environment()
    assert settings.media_handoff == "file"
    assert not settings.is_loopback
    create_app(settings)  # with tenants, so that it may listen where others can reach it


@pytest.mark.parametrize("engine", ENGINES)
def test_the_example_configuration_names_the_model_that_the_engines_serve(engine):
    aliases = configuration.load(ROOT / "docker" / "gateway.example.yaml").aliases
    assert {alias.engine_model for alias in aliases.values()} == {flags(engine)["--served-model-name"]}
