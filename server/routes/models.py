"""`GET /v1/models` and `GET /v1/models/{id}`."""

from fastapi import APIRouter

from server.engines.catalogue import Catalogue, ModelCard, ModelList
from server.errors import EngineUnavailable, ModelNotServed, UnknownModel
from server.observe.record import OTHER
from server.openapi import refusals
from server.routes.dependencies import TheCaller, TheRecord


def models_router(catalogue: Catalogue) -> APIRouter:
    """Return the routes that list and describe the models in `catalogue`."""
    router = APIRouter(prefix="/v1/models")

    @router.get("", responses=refusals())
    async def list_models(caller: TheCaller) -> ModelList:
        return ModelList(data=catalogue.cards(allowed=caller.models))

    @router.get(
        "/{model:path}", responses=refusals(UnknownModel, EngineUnavailable, ModelNotServed)
    )  # names may hold slashes
    async def retrieve_model(model: str, caller: TheCaller, record: TheRecord) -> ModelCard:
        try:
            card = catalogue.card(model, allowed=caller.models)
        except UnknownModel:
            record.model = OTHER
            raise
        record.model = model
        return card

    return router
