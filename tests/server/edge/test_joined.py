"""The head of an answer travels with the beginning of its body, and nothing is lost, reordered or kept back."""

import asyncio

import pytest

from server.edge.joined import JoinedHeads

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"


class Writes(asyncio.Transport):
    """A transport that notes what is written to it at once, and when it is closed."""

    def __init__(self):
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.seen = []

    def write(self, data):
        self.seen.append(bytes(data))

    def close(self):
        self.seen.append("closed")

    def abort(self):
        self.seen.append("aborted")

    def is_closing(self):
        return "closed" in self.seen


@pytest.fixture
async def joined():
    writes = Writes()
    return writes, JoinedHeads(writes, asyncio.get_running_loop())


async def test_a_head_is_written_together_with_the_body_that_follows(joined):
    writes, transport = joined
    transport.write(HEAD)
    assert writes.seen == []
    transport.write(b"body")
    transport.write(b"more")
    assert writes.seen == [HEAD + b"body", b"more"]
    await asyncio.sleep(0)
    assert writes.seen == [HEAD + b"body", b"more"]


async def test_a_head_whose_body_is_late_leaves_alone(joined):
    writes, transport = joined
    transport.write(HEAD)
    await asyncio.sleep(0)
    assert writes.seen == [HEAD]
    transport.write(b"body")
    assert writes.seen == [HEAD, b"body"]


async def test_answers_one_after_the_other_keep_their_order(joined):
    writes, transport = joined
    for body in (b"one", b"HTTP/1.1 is not always a head", b""):
        transport.write(HEAD)
        transport.write(body)
    await asyncio.sleep(0)
    assert b"".join(writes.seen) == HEAD + b"one" + HEAD + b"HTTP/1.1 is not always a head" + HEAD


async def test_a_transport_that_is_closed_sends_the_head_first(joined):
    writes, transport = joined
    transport.write(HEAD)
    transport.close()
    await asyncio.sleep(0)
    assert writes.seen == [HEAD, "closed"]
    assert transport.is_closing()


async def test_a_transport_that_is_aborted_sends_nothing_more(joined):
    writes, transport = joined
    transport.write(HEAD)
    transport.abort()
    await asyncio.sleep(0)
    assert writes.seen == ["aborted"]
