"""A configuration file that changes while the gateway serves."""

import asyncio
import logging
import os
import shutil
import signal
import time

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry

from server.configuration import Configuration
from server.errors import ConfigurationError
from server.keys import digest_of, new_key
from server.live import LiveConfiguration
from server.observe.metrics import Metrics
from tests.server.harness import CHAT, GatewayProcess, ask, gateway, until, until_true, value

OLD, NEW = new_key(), new_key()
ALIASES = {"fast": {"engine_model": "llava", "retention": 0.1}}
BOTH = {**ALIASES, "whole": {"engine_model": "llava", "retention": 1.0}}


def write(path, key=OLD, models=ALIASES, **more):
    content = {"models": models, "tenants": {"acme": {"keys": [{"sha256": digest_of(key.encode())}]}}, **more}
    path.write_text(yaml.safe_dump(content))


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gateway.yaml"
    write(path)
    return path


async def answer(client, key, **fields):
    return (await client.post(CHAT, json=ask(**{"model": "fast", **fields}), headers=bearer(key))).status_code


async def models(client, key=OLD):
    return {card["id"] for card in (await client.get("/v1/models", headers=bearer(key))).json()["data"]}


def served_to(client, key):
    async def is_served():
        return await answer(client, key) == 200

    return is_served


async def test_new_keys_models_and_limits_hold_as_soon_as_the_file_is_written(engine, config):
    async with gateway(engine, config=config) as client:
        assert (await answer(client, OLD), await answer(client, NEW), await models(client)) == (200, 401, {"fast"})
        write(config, NEW, BOTH, limits={"requests_per_minute": 2})
        await until_true(served_to(client, NEW))
        assert await answer(client, OLD) == 401
        assert await models(client, NEW) == {"fast", "whole"}
        assert await answer(client, NEW, model="whole") == 200
        assert await answer(client, NEW) == 429
        assert value(client, "video_retention_limit_ratio", model="whole") == 1.0


async def test_a_wrong_file_is_refused_as_a_whole_and_the_old_one_serves(engine, config, caplog):
    async with gateway(engine, config=config) as client:
        digest = active(client)
        write(config, NEW, {"fast": {"engine_model": "llava", "retention": 3}})

        async def is_refused():
            return value(client, "config_last_reload_successful") == 0

        await until_true(is_refused)
        assert (await answer(client, OLD), await answer(client, NEW)) == (200, 401)
        assert active(client) == digest
        (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert "the last one stays in use" in told
        assert "models.fast.retention: input should be less than or equal to 1, got 3" in told
        write(config, NEW)
        await until_true(served_to(client, NEW))
        assert value(client, "config_last_reload_successful") == 1
        assert active(client) != digest


def active(client):
    """The digest of the configuration in use, of which there is one."""
    samples = [sample for metric in client.registry.collect() for sample in metric.samples]
    (digest,) = [it.labels["sha256"] for it in samples if it.name == "aot_gateway_config_info"]
    return digest


async def test_metrics_tell_the_digest_that_sha256sum_prints_and_when_the_file_was_read(engine, config):
    begin = time.time()
    async with gateway(engine, config=config) as client:
        assert active(client) == digest_of(config.read_bytes())[:12]
        read = value(client, "config_last_reload_success_timestamp_seconds")
    assert begin <= read <= time.time()


@pytest.mark.parametrize("tenants", [None, {}])
async def test_a_gateway_off_loopback_does_not_lose_its_keys_to_a_changed_file(engine, config, tenants):
    async with gateway(engine, config=config, host="0.0.0.0") as client:
        content = yaml.safe_load(config.read_text())
        config.write_text(yaml.safe_dump({**content, "tenants": tenants}))

        async def is_refused():
            return value(client, "config_last_reload_successful") == 0

        await until_true(is_refused)
        assert (await client.post(CHAT, json=ask(model="fast"))).status_code == 401


async def test_the_log_names_what_changed_and_no_key(engine, config, caplog):
    caplog.set_level(logging.INFO, logger="server")
    async with gateway(engine, config=config) as client:
        write(config, NEW, {"whole": BOTH["whole"]}, limits={"requests_per_minute": 9})
        await until_true(whole_is_offered(client))
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "models new: whole; models gone: fast; tenants changed: acme; limits changed" in told
    assert digest_of(NEW.encode()) not in told


def whole_is_offered(client):
    async def is_offered():
        return (await client.get("/v1/models/whole", headers=bearer(NEW))).status_code == 200

    return is_offered


def rename(path, write_new):
    write_new(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def remove_first(path, write_new):
    path.unlink()
    write_new(path)


def touch_back(path, write_new):
    """Editors and copies may keep the time of the file."""
    before = path.stat()
    write_new(path.with_suffix(".new"))
    os.utime(path.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("put", [rename, remove_first, touch_back])
async def test_however_the_file_is_replaced_the_new_one_is_used(engine, config, put):
    async with gateway(engine, config=config) as client:
        put(config, lambda path: write(path, NEW))
        await until_true(served_to(client, NEW))


async def test_a_link_to_a_directory_that_is_turned_is_followed_as_kubernetes_updates_volumes(engine, tmp_path):
    for name, key in (("..old", OLD), ("..new", NEW)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "gateway.yaml", key)
    (tmp_path / "..data").symlink_to("..old")
    (tmp_path / "gateway.yaml").symlink_to("..data/gateway.yaml")
    async with gateway(engine, config=tmp_path / "gateway.yaml") as client:
        assert await answer(client, OLD) == 200
        (tmp_path / "..turned").symlink_to("..new")
        (tmp_path / "..turned").replace(tmp_path / "..data")
        shutil.rmtree(tmp_path / "..old")
        await until_true(served_to(client, NEW))


class Noted:
    """A configuration at `path` that is watched while the block lasts, with what became active."""

    def __init__(self, path):
        self.asked, self.seen = asyncio.Event(), []
        self.live = LiveConfiguration(
            path, accept=self.seen.append, warn=lambda _: None, metrics=Metrics(CollectorRegistry()), asked=self.asked
        )

    async def __aenter__(self):
        self._task = asyncio.create_task(self.live.watch())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()


async def test_a_file_that_is_still_being_written_is_left_alone_until_it_rests(config):
    async with Noted(config) as noted:
        models = {}
        for number in range(40):  # each of these is a configuration
            models[f"model-{number}"] = {"engine_model": "llava"}
            write(config, NEW, models)
            await asyncio.sleep(0.05)
        await until(lambda: len(noted.seen) > 1)
        assert [len(it.models) for it in noted.seen] == [1, 40]


async def test_a_file_that_is_gone_is_an_error_and_the_last_one_stays(config, caplog):
    async with Noted(config) as noted:
        config.unlink()
        await until(lambda: "can't be read (No such file or directory)" in caplog.text)
        assert set(noted.live.active.aliases) == {"fast"}
        await asyncio.sleep(2.5)
    assert caplog.text.count("can't be read") == 1  # not once a second


async def test_asked_for_the_file_is_read_even_if_it_seems_the_same(config):
    async with Noted(config) as noted:
        noted.asked.set()
        await until(lambda: len(noted.seen) > 1)


async def test_without_a_file_there_is_nothing_to_read_again():
    async with Noted(None) as noted:
        noted.asked.set()
        await asyncio.sleep(0.1)
        assert noted.seen == [Configuration()]


def test_what_is_not_accepted_at_the_start_is_raised(config):
    def refuse(_):
        raise ConfigurationError("not this one")

    with pytest.raises(ConfigurationError, match="not this one"):
        LiveConfiguration(config, accept=refuse, warn=lambda _: None, metrics=Metrics(CollectorRegistry()))


async def test_a_hangup_has_the_process_read_its_file_again(engine, config):
    async with (
        GatewayProcess(engine.url, CONFIG=str(config)) as process,
        httpx.AsyncClient(base_url=process.url, timeout=20) as client,
    ):
        assert await answer(client, OLD) == 200
        before = config.stat()
        config.write_text(config.read_text().replace(digest_of(OLD.encode()), digest_of(NEW.encode())))
        os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))  # nothing to see: only the signal tells
        await asyncio.sleep(1.2)
        assert await answer(client, OLD) == 200
        os.kill(process.process.pid, signal.SIGHUP)
        await until_true(served_to(client, NEW))
        process.drain()
        code, output = await process.ended()
    assert code == 0
    assert "reading the configuration again, as asked" in output
    assert NEW not in output
