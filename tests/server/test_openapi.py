"""The OpenAPI document is valid and matches the gateway's behaviour."""

import asyncio
import re

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from server.app import create_app
from server.errors import ENGINE_VERDICTS, INTERNAL, VERDICTS, ClientGone
from server.keys import digest_of, new_key
from server.settings import Settings
from tests.server.clips import clip, data_url
from tests.server.engines.profiles import ONEVISION
from tests.server.harness import CHAT, ask_about, gateway, served

KEY = new_key()
TOKENS = "/v1/video/tokens"
EXAMPLES = 10  # per operation, of valid and of invalid requests


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gateway.yaml"
    digests = [digest_of(KEY.encode()), digest_of(b"scraper")]
    path.write_text(
        f"tenants: {{acme: {{keys: [{{sha256: {digests[0]}}}]}}}}\nmetrics_keys: [{{sha256: {digests[1]}}}]"
    )
    return path


async def document(engine, **more):
    async with gateway(engine, **more) as client:
        answer = await client.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json()


def operations(found):
    return {(method.upper(), path): it for path, methods in found["paths"].items() for method, it in methods.items()}


async def test_the_document_is_valid_and_has_exactly_the_routes_there_are(engine):
    found = await document(engine)
    validate(found)
    app = create_app(Settings(engines=(engine.url,)))
    async with app.router.lifespan_context(app):
        served_here = {
            (method, re.sub(r":path\}", "}", route.path)) for route in app.routes for method in route.methods - {"HEAD"}
        }
    assert set(operations(found)) == served_here
    assert len({it["operationId"] for it in operations(found).values()}) == len(served_here)


async def test_every_status_that_an_error_has_is_in_the_document(engine):
    described = operations(await document(engine))[("POST", CHAT)]["responses"]
    possible = [v for kind, v in VERDICTS.items() if kind is not ClientGone]
    for verdict in (*possible, *ENGINE_VERDICTS.values(), INTERNAL):
        if verdict.status == 405:
            continue  # an answer to methods that the document does not name
        response = described[str(verdict.status)]
        assert ("retry-after" in response["headers"]) or verdict.retry_after_seconds is None
        assert ("x-should-retry" in response["headers"]) or not verdict.retry_is_waste
        assert (
            verdict.code is None
            or verdict.code.startswith(("file", "usage"))
            or verdict.code in response["description"]
            or (verdict.code == "not_found")
        )
    assert "www-authenticate" in described["401"]["headers"]


async def test_keys_are_asked_for_in_the_document_where_they_are_asked_for(engine, config):
    open_to_all = operations(await document(engine))
    assert all(it["security"] == [] for it in open_to_all.values())
    async with gateway(engine, config=config) as client:
        found = operations((await client.get("/openapi.json")).json())
        for (method, path), it in found.items():
            status = (await client.request(method, path)).status_code
            assert (status == 401) == bool(it["security"]), path
            assert bool(it["security"]) <= ("401" in it["responses"])


class Bearer:
    """An authentication provider for schemathesis, which sends each endpoint its own key."""

    def get(self, case, context):
        return "scraper" if case.operation.path.startswith("/metrics") else KEY

    def set(self, case, data, context):
        case.headers["authorization"] = f"Bearer {data}"


def checked(operation, mode, fill):
    """Send requests that the document allows or forbids, and check every answer against the document."""
    is_chat = operation.path in (CHAT, TOKENS)
    excluded = []
    if is_chat or operation.method == "post":
        excluded.append(positive_data_acceptance)  # random models are unknown, random files are not videos
    if is_chat:
        excluded.append(negative_data_rejection)  # the engine, not the gateway, validates messages

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        if mode is schemathesis.GenerationMode.POSITIVE:
            fill(case)
        statuses.add(case.call_and_validate(excluded_checks=excluded).status_code)

    statuses = set()
    check()
    return statuses


def filled_with(file_id):
    """Return a function that inserts existing names into a case, so that some requests succeed."""

    def fill(case):
        if "model" in case.path_parameters:
            case.path_parameters["model"] = "llava"
        if "file_id" in case.path_parameters and case.method == "GET":
            case.path_parameters["file_id"] = file_id
        if "usage" in case.path:  # most dates are of days that are not kept
            case.query = {"days": 3}
        if case.path == TOKENS:
            case.body = ask_about(data_url(clip(), "video/mp4"))
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "llava"
        if isinstance(case.body, dict) and "file" in case.body:
            case.body["file"] = clip()

    return fill


@pytest.mark.slow
async def test_answers_to_whatever_is_sent_are_as_the_document_says(engine, tmp_path, config):
    engine.profile = ONEVISION
    directory = tmp_path / "files"
    directory.mkdir()
    settings = Settings(engines=(engine.url,), config=config, files_dir=directory)

    def run(url, fill):
        api = schemathesis.openapi.from_url(f"{url}/openapi.json")
        api.auth()(Bearer)
        statuses = {}
        for result in api.get_all_operations():
            operation = result.ok()
            modes = [schemathesis.GenerationMode.POSITIVE]
            if operation.body or operation.query:
                modes.append(schemathesis.GenerationMode.NEGATIVE)
            for mode in modes:
                statuses[operation.label, mode.value] = checked(operation, mode, fill)
        return statuses

    async with served(settings) as url:
        async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=20) as client:
            upload = await client.post("/v1/files", files={"file": ("clip.mp4", clip())}, data={"purpose": "video"})

        statuses = await asyncio.to_thread(run, url, filled_with(upload.json()["id"]))
    assert all(200 in seen for (label, mode), seen in statuses.items() if mode == "positive" and "DELETE" not in label)
    assert all(400 in seen for (_, mode), seen in statuses.items() if mode == "negative")
