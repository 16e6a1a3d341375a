"""`GET /v1/models` and `GET /v1/models/{id}`."""

from typing import Any

from fastapi import APIRouter, Request

from server.catalogue import Catalogue
from server.errors import UnknownModel
from server.metrics import OTHER
from server.record import STATE_KEY, RequestRecord

LIST_PATH = "/v1/models"
ONE_PATH = "/v1/models/{model:path}"  # model names may hold slashes


def models_router(catalogue: Catalogue) -> APIRouter:
    """Return the routes over `catalogue`."""
    router = APIRouter()

    @router.get(LIST_PATH)
    async def list_models(request: Request) -> dict[str, Any]:
        record: RequestRecord = request.scope["state"][STATE_KEY]
        record.route = LIST_PATH
        return {"object": "list", "data": catalogue.cards(allowed=record.allowed_models)}

    @router.get(ONE_PATH)
    async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
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
