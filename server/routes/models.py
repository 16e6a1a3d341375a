"""`GET /v1/models` and `GET /v1/models/{id}`."""

from fastapi import APIRouter, Request

from server.engines.catalogue import Catalogue, ModelCard, ModelList
from server.errors import EngineUnavailable, UnknownModel
from server.observe.metrics import OTHER
from server.observe.record import STATE_KEY, RequestRecord
from server.openapi import refusals

LIST_PATH = "/v1/models"
ONE_PATH = "/v1/models/{model:path}"  # model names may hold slashes


def models_router(catalogue: Catalogue) -> APIRouter:
    """Return the routes over `catalogue`."""
    router = APIRouter()

    @router.get(LIST_PATH, responses=refusals())
    async def list_models(request: Request) -> ModelList:
        record: RequestRecord = request.scope["state"][STATE_KEY]
        record.route = LIST_PATH
        return ModelList(data=catalogue.cards(allowed=record.allowed_models))

    @router.get(ONE_PATH, responses=refusals(UnknownModel, EngineUnavailable))
    async def retrieve_model(model: str, request: Request) -> ModelCard:
        record: RequestRecord = request.scope["state"][STATE_KEY]
        record.route = "/v1/models/{id}"
        try:
            card = catalogue.card(model, allowed=record.allowed_models)
        except UnknownModel:
            record.model = OTHER
            raise
        record.model = model
        return card

    return router
