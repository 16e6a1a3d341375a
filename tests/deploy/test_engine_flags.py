"""Whatever starts an engine here starts it with flags that vLLM takes, and with those that the gateway counts on."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from aot_vllm.adapters.settings import PluginSettings
from tests.deploy.files import ROOT, composed

KUBERNETES = ROOT / "deploy" / "kubernetes"
CODE = """
import json, sys
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # from 0.33 on
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
names = sys.argv[2].split()
parsed = [vars(parser.parse_args(command)) for command in json.loads(sys.argv[1])]
print("told", json.dumps([{name: args[name] for name in names} for args in parsed]))
"""
NAMES = "model_tag served_model_name video_pruning_rate additional_config trust_request_mm_kwargs "
NAMES += "enable_prompt_tokens_details headless"


def documents(path: str) -> list[dict]:
    return list(yaml.safe_load_all((KUBERNETES / path).read_text()))


def substituted(arguments: list[str]) -> list[str]:
    """Arguments as Kubernetes hands them over."""
    [generator] = [g for g in documents("base/kustomization.yaml")[0]["configMapGenerator"] if g["name"] == "model"]
    values = dict(literal.split("=", 1) for literal in generator["literals"])
    values |= {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "engine-0.engine"}
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], argument) for argument in arguments]


def commands() -> dict[str, list[str]]:
    services = composed(AOT_MODEL="a/model")["services"]
    [single] = [d for d in documents("base/engine.yaml") if d["kind"] == "StatefulSet"]
    group = documents("examples/leader-worker-set.yaml")[0]["spec"]["leaderWorkerTemplate"]
    pods = {
        "kubernetes": single["spec"]["template"],
        "leader": group["leaderTemplate"],
        "worker": group["workerTemplate"],
    }
    serve, serve_on_a_cpu = re.findall(r"vllm serve ((?:.*\\\n)*.*)", (ROOT / "README.md").read_text())
    return {
        "compose": services["engine"]["command"],
        "compose, cpu": services["engine-cpu"]["command"],
        "README": shlex.split(serve.replace("\\\n", " ")),
        "README, cpu": shlex.split(serve_on_a_cpu.replace("\\\n", " ")),
        **{name: substituted(pod["spec"]["containers"][0]["args"]) for name, pod in pods.items()},
    }


@pytest.fixture(scope="module")
def told():
    """What vLLM makes of each command."""
    command = [sys.executable, "-c", CODE, json.dumps(list(commands().values())), NAMES]
    parsed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    return dict(zip(commands(), json.loads(parsed.stdout.rpartition("told ")[2]), strict=True))


def test_vllm_takes_them_and_each_switches_the_reduction_on(told):
    assert {name: args["video_pruning_rate"] for name, args in told.items()} == dict.fromkeys(commands(), 0.9)
    assert all(args["model_tag"] for args in told.values())
    assert {name for name, args in told.items() if args["headless"]} == {"worker"}


def test_the_plugins_settings_are_left_to_it_unless_the_operator_says_otherwise(told):
    named = {name: args["additional_config"] for name, args in told.items()}
    assert {name for name, config in named.items() if config} == {"compose", "compose, cpu", "kubernetes"}
    assert all(config in ({}, {"aot": None}) for config in named.values())
    assert PluginSettings.from_additional_config({"aot": None}) == PluginSettings()
    settings = '{"preset": "paper", "allowed_presets": ["diverse"]}'
    [argument] = [
        part
        for part in composed(AOT_MODEL="a/model", AOT_SETTINGS=settings)["services"]["engine"]["command"]
        if part.startswith("--additional-config=")
    ]
    read = PluginSettings.from_additional_config(json.loads(argument.partition("=")[2]))
    assert (read.method, read.allowed_presets) == ({"preset": "paper"}, ("diverse",))


def test_engines_that_answer_count_tokens_and_take_a_requests_retention(told):
    answering = {name: args for name, args in told.items() if not args["headless"]}
    for name, args in answering.items():
        assert args["trust_request_mm_kwargs"] is args["enable_prompt_tokens_details"] is True, name
        assert args["served_model_name"] == (None if name.startswith("README") else ["video"]), name
