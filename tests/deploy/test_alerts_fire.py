"""Every alert that ships fires in a real Prometheus at what gateways really export when what it is about happens.

Windows and waiting times are ten seconds and none here, because nobody waits for three days. Their lengths have tests
of their own.
"""

import asyncio
import contextlib
import itertools
import json
import re
import time

import httpx
import pytest
import yaml

from server.settings import Settings
from tests.deploy.rules import ALERTS, PROMETHEUS, RULE_FILES
from tests.programs import needs
from tests.server.clips import clip, data_url
from tests.server.engine_double import SAVED, EngineDouble
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import CHAT, ask, ask_about, free_port, served

pytestmark = [pytest.mark.slow, needs("prometheus")]

WINDOW_SECONDS = 10
PATIENCE_SECONDS = 90
VIDEO = data_url(clip())
UNTRUSTED = b'{"error":{"message":"Start the server with --trust-request-mm-kwargs","code":400}}'
FULL = 'vllm:kv_cache_usage_perc{model_name="tiny"} 0.99\n'
GOOD = 'vllm:kv_cache_usage_perc{model_name="tiny"} 0.2\naot_engine_reductions_total 3\n'
WHOLE = {**SAVED, "x-aot-video-tokens-after": SAVED["x-aot-video-tokens-before"], "x-aot-video-retention": "1"}


def hurried(folder):
    """The rules as they ship, with short windows and without waiting; their paths."""
    paths = []
    for path in RULE_FILES:
        rules = yaml.safe_load(path.read_text())
        for rule in itertools.chain.from_iterable(group["rules"] for group in rules["groups"]):
            rule["expr"] = re.sub(r"\[\d+[smhd]\]", f"[{WINDOW_SECONDS}s]", rule["expr"])
            rule.pop("for", None)
        paths.append(folder / path.name)
        paths[-1].write_text(yaml.safe_dump(rules))
    return paths


@contextlib.asynccontextmanager
async def prometheus(folder, *, gateways, engines):
    """A client of a Prometheus that is configured as it ships, but for addresses, intervals and the rules' windows."""
    folder.mkdir()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(path) for path in hurried(folder)]
    addresses = {"gateway:8080": gateways, "engine:8000": engines}
    for job in config["scrape_configs"]:
        for group in job["static_configs"]:
            targets = itertools.chain.from_iterable(addresses[target] for target in group["targets"])
            group["targets"] = [url.removeprefix("http://") for url in targets]
    path, port = folder / "prometheus.yml", free_port()
    path.write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        address = f"--web.listen-address=127.0.0.1:{port}"
        process = await asyncio.create_subprocess_exec(*command, address, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            await until_ready(client)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def until_ready(client):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/-/ready")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise AssertionError("Prometheus was not ready in time")


async def firing(client):
    """The names of the alerts that fire, each with the value that its expression has."""
    answer = (await client.get("/api/v1/alerts")).json()
    return {it["labels"]["alertname"]: it["value"] for it in answer["data"]["alerts"] if it["state"] == "firing"}


class Rig(contextlib.AsyncExitStack):
    """Gateways and engines, and clients that ask them until the block ends."""

    async def __aenter__(self):
        await super().__aenter__()
        self.client = await self.enter_async_context(
            httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None))
        )
        return self

    async def engine(self, **behaviour):
        return await self.enter_async_context(EngineDouble(**behaviour).serving())

    async def gateway(self, *engine_urls, **settings):
        return await self.enter_async_context(
            served(Settings(engines=engine_urls, engine_health_seconds=0.5, **settings))
        )

    def keep_asking(self, gateway, request, *, at_once=1, every=0.1):
        """Let clients ask one time after another, whatever the answer."""

        async def ask_on():
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await self.client.post(gateway + CHAT, json=request)
                await asyncio.sleep(every)

        for _ in range(at_once):
            self.callback(asyncio.create_task(ask_on()).cancel)


def configured(folder, name, content):
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return path


async def broken(rig, folder):
    """An engine without the plugin that breaks all requests off, and whose cache is full."""
    engine = await rig.engine(dies_after=0, metrics=FULL)
    gateway = await rig.gateway(engine.url)
    rig.keep_asking(gateway, ask(), at_once=4)
    return [gateway], [engine.url]


async def untrusting(rig, folder):
    """An engine that lacks a flag."""
    engine = await rig.engine(error=(400, UNTRUSTED, "application/json"))
    gateway = await rig.gateway(engine.url)
    rig.keep_asking(gateway, ask())
    return [gateway], []


async def alone(rig, folder):
    """A gateway whose engine and Redis are not there, and another that is not there itself."""
    config = configured(folder, "limited", {"limits": {"requests_per_minute": 10**6}})
    backend = f"redis://127.0.0.1:{free_port()}/0"
    gateway = await rig.gateway(f"http://127.0.0.1:{free_port()}", config=config, limits_backend=backend)
    rig.keep_asking(gateway, ask())
    return [gateway, f"http://127.0.0.1:{free_port()}"], [f"http://127.0.0.1:{free_port()}"]


async def crowded(rig, folder):
    """A gateway with one place at the engine and two in the queue, for many clients who are served slowly."""
    engine = await rig.engine(delay_seconds=4)
    gateway = await rig.gateway(engine.url, max_concurrency=1, max_queue=2)
    rig.keep_asking(gateway, ask(), at_once=6)
    return [gateway], []


async def late(rig, folder):
    """An engine whose streams begin late."""
    engine = await rig.engine(delay_seconds=4.5)
    gateway = await rig.gateway(engine.url)
    rig.keep_asking(gateway, ask(stream=True), at_once=40)
    return [gateway], []


async def lavish(rig, folder):
    """An engine that keeps all of a video, a Redis that is not there, and videos on hosts that do not deliver."""
    engine = await rig.engine(headers=dict(WHOLE))
    config = configured(folder, "lavish", {"models": {"fast": {"engine_model": "llava", "max_retention": 0.5}}})
    host = f"127.0.0.1:{free_port()}"
    settings = {"media_allow_hosts": (host,), "media_allow_http": True}
    backend = f"redis://127.0.0.1:{free_port()}/0"
    gateway = await rig.gateway(engine.url, config=config, limits_backend=backend, **settings)
    rig.keep_asking(gateway, ask_about(VIDEO, model="fast"))
    rig.keep_asking(gateway, ask_about(f"http://{host}/clip.mp4", model="fast"))
    return [gateway], []


async def outdated(rig, folder):
    """A gateway whose file has been made wrong since it was read."""
    engine = await rig.engine()
    config = configured(folder, "outdated", {"models": {"slow": {"engine_model": "llava"}}})
    gateway = await rig.gateway(engine.url, config=config)
    config.write_text("models: {fast: {}}")
    return [gateway], []


async def silent(rig, folder):
    """An engine that does not report what it saved."""
    engine = await rig.engine(headers={})
    gateway = await rig.gateway(engine.url)
    rig.keep_asking(gateway, ask_about(VIDEO))
    return [gateway], []


async def well(rig, folder):
    """An engine as it should be."""
    engine = await rig.engine(profile=ONEVISION, metrics=GOOD)
    gateway = await rig.gateway(engine.url)
    for request in (ask_about(VIDEO), ask(stream=True)):
        rig.keep_asking(gateway, request, at_once=2)
    return [gateway], [engine.url]


async def seen_firing(folder, scenes, *, wanted, seconds):
    """The alerts that fire within some time while the scenes play, or until all that are wanted have fired."""
    folder.mkdir()
    async with Rig() as rig:
        gateways, engines = [], []
        for scene in scenes:
            more_gateways, more_engines = await scene(rig, folder)
            gateways += more_gateways
            engines += more_engines
        async with prometheus(folder / "prometheus", gateways=gateways, engines=engines) as client:
            seen, deadline = {}, time.monotonic() + seconds
            while not wanted <= seen.keys() and time.monotonic() < deadline:
                seen |= await firing(client)
                await asyncio.sleep(0.5)
            return seen


TROUBLE = (broken, untrusting, alone, crowded, late, lavish, outdated)
ONLY_WITHOUT_COUNTS = {"AOTSavingsNotReported"}


async def test_every_alert_fires_when_what_it_is_about_happens(tmp_path):
    wanted = ALERTS.keys() - ONLY_WITHOUT_COUNTS
    seen = await seen_firing(tmp_path / "trouble", TROUBLE, wanted=wanted, seconds=PATIENCE_SECONDS)
    assert seen.keys() >= wanted, f"silent: {sorted(wanted - seen.keys())}"


async def test_the_alert_about_missing_counts_fires_where_no_engine_reports_them(tmp_path):
    wanted = ONLY_WITHOUT_COUNTS
    seen = await seen_firing(tmp_path / "silent", (silent,), wanted=wanted, seconds=PATIENCE_SECONDS)
    assert seen.keys() >= wanted


async def test_no_alert_fires_while_all_is_well(tmp_path):
    nothing = {"anything"}
    seen = await seen_firing(tmp_path / "well", (well,), wanted=nothing, seconds=2 * WINDOW_SECONDS)
    assert seen.keys() <= {"AOTGatewayDown"}, seen  # before the first scrape
