import pytest

from tests.server.media.hosts import PUBLIC, Internet, MediaHost


@pytest.fixture
async def host():
    async with MediaHost().serving() as host:
        yield host


@pytest.fixture
def internet(host):
    """A network on which the name `media.example` leads to `host`."""
    internet = Internet()
    internet.route(PUBLIC, 80, host)
    internet.route(PUBLIC, 443, host)
    return internet
