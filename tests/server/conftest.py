import pytest

from tests.server.engine_double import EngineDouble


@pytest.fixture
async def engine():
    async with EngineDouble().serving() as double:
        yield double
