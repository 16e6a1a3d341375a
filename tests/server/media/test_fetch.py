# ruff: noqa: RUF001 - the tests need look-alike characters
import asyncio
import contextlib
import os
import re
import ssl
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes

import pytest

from server.errors import FetchFailed, MediaRefused, Overloaded
from server.media import fetch
from server.media.fetch import Fetcher, HostRules, Network, SystemResolver
from server.media.file import on_disk
from server.media.media_url import joined, parse_url
from tests.server.clips import clip
from tests.server.media.hosts import PUBLIC, Internet, MediaHost

MAX_BYTES = 10**6


@contextlib.asynccontextmanager
async def make_fetcher(network, *, allow=(), deny=(), only=(), **changes):
    rules = HostRules(frozenset(allow), frozenset(deny), frozenset(only))
    options = {"allow_http": True, "max_bytes": MAX_BYTES, "total_seconds": 5, **changes}
    async with Fetcher(rules=rules, network=network, **options) as fetcher:
        yield fetcher


@pytest.fixture
async def fetcher(internet):
    async with make_fetcher(internet.network) as fetcher:
        yield fetcher


async def fetched(fetcher, url):
    with on_disk(None, max_bytes=MAX_BYTES) as file:
        await fetcher.fetch(url, file)
        return os.pread(file.descriptor(), MAX_BYTES, 0)


async def refused(fetcher, url):
    with pytest.raises(MediaRefused) as caught:
        await fetched(fetcher, url)
    assert not re.search(r"\d\.\d+\.|:\d|\[|\.(example|trap|internal)", caught.value.message), caught.value.message
    return caught.value.code


async def test_media_are_fetched_from_any_public_host(fetcher, internet, host):
    assert await fetched(fetcher, "http://media.example/clip.mp4?a=b#c") == clip()
    assert internet.dialled == [(PUBLIC, 80)]
    assert host.hosts == ["media.example"]


@pytest.mark.parametrize("address", [PUBLIC, "[2606:4700::1111]"])
async def test_a_public_address_in_a_url_is_dialled_as_it_is(fetcher, internet, host, address):
    internet.route(address.strip("[]"), 8080, host)
    assert await fetched(fetcher, f"http://{address}:8080/clip.mp4") == clip()
    assert internet.dialled == [(address.strip("[]"), 8080)]
    assert internet.names.asked == []


SPELLINGS = [
    *(
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0X7F.0.0.1",
        "017700000001",
    ),
    *("0177.0.0.1", "0177.1", "127.0.0.0x1", "127.00.0.1", "127.0.0.1..", "0", "0.0.0.0", "1.1.1.1.1", "256.1.1.1"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]", "[::127.0.0.1]"),
    *("[64:ff9b::7f00:1]", "[64:ff9b::169.254.169.254]", "[64:ff9b:1::7f00:1]", "[2001::7f00:1]", "[::ffff:0:7f00:1]"),
    *("[2002:7f00:1::]", "[fe80::1%25eth0]", "[fe80::1%eth0]", "[::1%25lo]", "[2606:4700::1%251]"),
    *("[fd00:ec2::254]", "169.254.169.254", "0xa9fea9fe", "2852039166", "[::ffff:169.254.169.254]", "168.63.129.16"),
    *(
        "１２７.０.０.１",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "127．0．0．1",
        "127｡0｡0｡1",
        "%31%32%37.0.0.1",
        "127%2e0%2e0%2e1",
    ),
    *("10.0.0.1", "100.100.100.200", "192.168.0.1", "224.0.0.1", "255.255.255.255"),
    *("localhost", "LOCALHOST.", "ｌocalhost", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "local.trap", "mapped.trap", "mixed.trap", "zone.trap"),
    *(
        "",
        ".",
        "..",
        "a..b",
        "media.example..",
        "*",
        "a,b",
        "a*b",
        "-",
        "xn--",
        "a\u200bb",
        "a" * 300,
        "a" * 64 + ".example",
        ".".join(["a" * 60] * 5),
        "a" * 100_000,
        "[v1.a]",
        "[1.2.3.4]",
    ),
]


@pytest.mark.parametrize("port", ["", ":443", ":22"])
async def test_no_spelling_of_an_address_that_is_not_public_is_dialled(internet, port):
    internet.names.answers = {
        "localhost": ["127.0.0.1", "::1"],
        "local.trap": ["10.1.2.3"],
        "mapped.trap": ["::ffff:10.1.2.3"],
        "mixed.trap": [PUBLIC, "127.0.0.1"],
        "zone.trap": ["fe80::1%eth0"],
    }
    async with make_fetcher(internet.network) as fetcher:
        for spelling in SPELLINGS:
            for scheme in ("http", "https"):
                code = await refused(fetcher, f"{scheme}://{spelling}{port}/clip.mp4")
                assert code in ("invalid_media_url", "media_host_not_allowed", "media_fetch_failed"), spelling
    assert internet.dialled == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1\\@media.example/",
        "http://media.example\\@127.0.0.1/",
        "http:\\\\127.0.0.1/",
        "http://media.example:80@127.0.0.1/",
        "http://media.example@127.0.0.1/",
        "http://user:pass@media.example/",
        "http://@media.example/",
        "http://user@name@127.0.0.1/",
        "http://media.example%40127.0.0.1/",
        "http://media.example%2f@127.0.0.1/",
        "http://media.example%00.trap/",
        "http://media.example%0d%0ahost:%20other/",
        "http://media.example\r\n@127.0.0.1/",
        "http://127.0.0.1#@media.example/",
        "http://127.0.0.1?@media.example/",
        "http://127.0.0.1/@media.example/",
        "http://127.0.0.1;@media.example/",
        "http://media.example:80:80/",
        "http://media.example:99999/",
        "http://media.example:65536/",
        "http://media.example:080:/",
        "http://media.example:8_0/",
        "http://media.example:+80/",
        "http://media.example:0/",
        "http://media.example:-1/",
        "http://media.example:٨٠/",
        "http://media.example /",
        "http://media.example\t/",
        "http://media.example\n/clip.mp4",
        "http://media.example/clip.mp4\r\nhost: other",
        "\x01http://media.example/",
        "http:///clip.mp4",
        "http:media.example/clip.mp4",
        "//media.example/clip.mp4",
        "media.example/clip.mp4",
        "http://[::1",
        "file:///etc/passwd",
        "file://media.example/etc/passwd",
        "ftp://media.example/",
        "gopher://media.example/",
        "rtsp://media.example/",
        "concat:http://media.example/|file:///etc/passwd",
        "subfile:,,start,0,end,9,,:/etc/passwd",
        "",
    ],
)
async def test_a_url_that_two_parsers_could_read_in_two_ways_is_not_dialled(fetcher, internet, url):
    assert await refused(fetcher, url) in ("invalid_media_url", "media_host_not_allowed")
    assert internet.dialled == []
    assert internet.names.asked == []


@pytest.mark.parametrize("path", ["/a%0d%0ax-evil:%20yes", "/a\u2028b", "/a\x85b", "/a%0D%0A%0D%0AGET%20/b%20HTTP/1.1"])
async def test_nothing_in_a_path_becomes_a_line_of_its_own(fetcher, host, path):
    assert await refused(fetcher, f"http://media.example{path}") == "media_fetch_failed"  # the host has no such file
    assert [asked.encode() for asked in host.asked] == [unquote_to_bytes(path.encode())]


async def test_host_names_are_taken_in_every_spelling_of_their_own(fetcher, internet, host):
    internet.names.answers["xn--bcher-kva.example"] = [PUBLIC]
    for name in ("MEDIA.example", "media.example.", "ｍedia.example", "bücher.example", "media。example"):
        assert await fetched(fetcher, f"http://{name}/clip.mp4") == clip()
    assert host.hosts == ["media.example"] * 3 + ["xn--bcher-kva.example", "media.example"]


async def test_every_connection_asks_for_the_name_once_and_dials_what_was_checked(internet):
    internet.names.answers["rebinding.trap"] = ([PUBLIC], ["127.0.0.1"])
    async with make_fetcher(internet.network) as fetcher:
        assert await fetched(fetcher, "http://rebinding.trap/clip.mp4") == clip()
        assert internet.names.asked == ["rebinding.trap"]
        assert await refused(fetcher, "http://rebinding.trap/clip.mp4") == "media_host_not_allowed"
    assert internet.dialled == [(PUBLIC, 80)]


async def test_a_name_that_changes_its_answer_between_two_redirects_is_refused(internet, host):
    internet.names.answers["rebinding.trap"] = ([PUBLIC], ["169.254.169.254"])
    host.redirects = {"/1": "/2"}
    async with make_fetcher(internet.network) as fetcher:
        assert await refused(fetcher, "http://rebinding.trap/1") == "media_host_not_allowed"
    assert internet.dialled == [(PUBLIC, 80)]


async def test_the_socket_refuses_what_the_resolver_and_the_parser_would_let_through(internet, monkeypatch):
    monkeypatch.setattr(fetch._PublicOnly, "resolve", lambda self, *a, **k: internet.names.resolve(*a, **k))
    monkeypatch.setattr(Fetcher, "check", lambda self, url: fetch.yarl.URL(url))
    internet.names.answers["local.trap"] = ["127.0.0.1"]
    async with make_fetcher(internet.network) as fetcher:
        for host in ("local.trap", "127.0.0.1", "[::1]"):
            assert await refused(fetcher, f"http://{host}/clip.mp4") == "media_fetch_failed"
    assert internet.dialled == []


async def test_proxies_of_the_environment_are_not_used(internet, host, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with make_fetcher(internet.network) as fetcher:
        assert await fetched(fetcher, "http://media.example/clip.mp4") == clip()
    assert internet.dialled == [(PUBLIC, 80)]


async def test_over_tls_the_name_of_the_url_is_asked_for_and_proved(internet):
    certificate = Path(__file__).with_name("media.example.pem")
    server, asked = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), []
    server.load_cert_chain(certificate)
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    network = replace(internet.network, tls=ssl.create_default_context(cafile=certificate))
    internet.names.answers["other.example"] = [PUBLIC]
    async with MediaHost().serving(server) as host, make_fetcher(network, allow_http=False) as fetcher:
        internet.route(PUBLIC, 443, host)
        assert await fetched(fetcher, "https://media.example./clip.mp4") == clip()
        assert await refused(fetcher, "https://other.example/clip.mp4") == "media_fetch_failed"
        assert await refused(fetcher, f"https://{PUBLIC}/clip.mp4") == "media_fetch_failed"
    assert asked == ["media.example", "other.example", None]
    assert host.hosts == ["media.example"]
    assert set(internet.dialled) == {(PUBLIC, 443)}


async def test_plain_http_is_refused_unless_it_is_allowed(internet):
    async with make_fetcher(internet.network, allow_http=False, allow=("10.0.0.7:9000",)) as fetcher:
        for url in ("http://media.example/", "http://10.0.0.7:9000/"):
            assert await refused(fetcher, url) == "media_scheme_not_allowed"
    assert internet.dialled == []


async def test_a_private_host_that_the_operator_lists_is_fetched_from(internet, host):
    internet.names.answers["nas.internal"] = ["10.0.0.7"]
    internet.routes = {("10.0.0.7", 9000): host, ("10.0.0.7", 80): host, ("fd00::7", 9000): host}
    async with make_fetcher(
        internet.network, allow=("nas.internal:9000", "10.0.0.7:9000", "10.0.0.7", "[fd00::7]:9000")
    ) as fetcher:
        for name in ("nas.internal:9000", "NAS.internal.:9000", "10.0.0.7:9000", "10.0.0.7", "[fd00::7]:9000"):
            assert await fetched(fetcher, f"http://{name}/clip.mp4") == clip()
        for name in ("nas.internal", "nas.internal:9001", "10.0.0.7:22", "10.0.0.8:9000", "sub.nas.internal:9000"):
            assert await refused(fetcher, f"http://{name}/clip.mp4") in ("media_host_not_allowed", "media_fetch_failed")
    assert {address for address, _ in internet.dialled} == {"10.0.0.7", "fd00::7"}


async def test_denied_hosts_and_all_below_them_are_not_fetched_from(internet):
    async with make_fetcher(internet.network, deny=("media.example", PUBLIC), allow=("media.example",)) as fetcher:
        for name in ("media.example", "media.example.", "MEDIA.example", "a.b.media.example", PUBLIC):
            assert await refused(fetcher, f"http://{name}/clip.mp4") == "media_host_not_allowed"
        assert await refused(fetcher, "http://notmedia.example/clip.mp4") == "media_fetch_failed"  # no such host
    assert internet.dialled == []


async def test_if_hosts_are_listed_nothing_else_is_fetched_from_but_the_exceptions(internet, host):
    internet.names.answers.update({"cdn.media.example": [PUBLIC], "other.example": [PUBLIC]})
    internet.route("10.0.0.7", 80, host)
    async with make_fetcher(internet.network, only=("media.example",), allow=("10.0.0.7",)) as fetcher:
        for name in ("media.example", "cdn.media.example", "10.0.0.7"):
            assert await fetched(fetcher, f"http://{name}/clip.mp4") == clip()
        assert await refused(fetcher, "http://other.example/clip.mp4") == "media_host_not_allowed"


async def test_redirects_are_followed_and_each_is_checked(fetcher, internet, host):
    internet.names.answers["other.example"] = [PUBLIC]
    host.redirects = {"/1": "/2", "/2": "http://other.example/3#f", "/3": "clip.mp4"}
    assert await fetched(fetcher, "http://media.example/1") == clip()
    assert host.asked == ["/1", "/2", "/3", "/clip.mp4"]
    assert host.hosts == ["media.example"] * 2 + ["other.example"] * 2


@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("http://127.0.0.1:1/clip.mp4", "media_host_not_allowed"),
        ("http://169.254.169.254/latest", "media_host_not_allowed"),
        ("http://2130706433/", "invalid_media_url"),
        ("http://local.trap/", "media_host_not_allowed"),
        ("//local.trap/", "media_host_not_allowed"),
        ("http://media.example@127.0.0.1/", "invalid_media_url"),
        ("\\\\127.0.0.1\\", "media_fetch_failed"),
        ("file:///etc/passwd", "invalid_media_url"),
        ("data:video/mp4;base64,AAAA", "invalid_media_url"),
        ("ftp://media.example/clip.mp4", "invalid_media_url"),
        ("javascript:alert(1)", "invalid_media_url"),
        ("http://media.example:0/", "invalid_media_url"),
        ("http://media.example:65536/", "invalid_media_url"),
        ("http://[::ffff:7f00:1]/", "media_host_not_allowed"),
        ("http://" + "a" * 5000 + "/", "invalid_media_url"),
        ("http://[::1", "invalid_media_url"),
        ("", "media_fetch_failed"),
        ("/1", "media_fetch_failed"),
    ],
)
async def test_redirects_out_and_round_in_circles_are_refused(fetcher, internet, host, to, code):
    internet.names.answers["local.trap"] = ["10.0.0.1"]
    host.redirects = {"/1": to}
    assert await refused(fetcher, "http://media.example/1") == code
    assert len(host.asked) == (4 if to in ("", "/1") else 1)
    assert {address for address, _ in internet.dialled} == {PUBLIC}


AS_GIVEN = [
    *("/clip.mp4?", "/clip.mp4?a", "/clip.mp4?a=&b", "/clip.mp4?a=b?c=d", "/clip.mp4??", "/clip.mp4?a=%2B+%20"),
    *("/clip%2Emp4", "/%63lip.mp4", "/clip.mp4?X-Amz-Signature=%27%40%3A%2F%7E", "/clip.mp4?x=%27&y='&z=%c3%a4"),
    *("/clip.mp4?a=%zz&b=100%", "/clip.mp4?a='()*!$;,/:@&b={}|^`[]", "/clip.mp4?a=~b&c=%7Eb", "/clip.mp4?a;b"),
    *("/clip.mp4?redirect=http://media.example/@a", "/clip.mp4?sig=a+b/c=="),
]
ENCODED_ONCE = {
    "/clip.mp4?name=my clip": "/clip.mp4?name=my%20clip",
    "/clip.mp4?name=Bär&a=%20 ": "/clip.mp4?name=B%C3%A4r&a=%20",
    '/clip.mp4?a="<>': "/clip.mp4?a=%22%3C%3E",
    "/clip.mp4?a=片": "/clip.mp4?a=%E7%89%87",
    "/clip.mp4?a=%E7%89%87 b": "/clip.mp4?a=%E7%89%87%20b",
}


@pytest.mark.parametrize("path", AS_GIVEN)
async def test_a_url_is_asked_for_byte_by_byte_as_it_is_given(fetcher, host, path):
    assert await fetched(fetcher, f"http://media.example{path}#fragment") == clip()
    assert host.asked_raw == [path]


@pytest.mark.parametrize("path", AS_GIVEN)
async def test_after_a_redirect_too_a_url_is_asked_for_as_it_is_given(fetcher, host, path):
    for location in (f"http://media.example{path}", f"//media.example{path}#f", path, path[1:]):
        host.asked_raw.clear()
        host.redirects = {"/1": location}
        assert await fetched(fetcher, "http://media.example/1") == clip()
        assert host.asked_raw == ["/1", path]


@pytest.mark.parametrize(("path", "sent"), ENCODED_ONCE.items())
async def test_what_a_url_cant_hold_is_encoded_once_as_browsers_do(fetcher, host, path, sent):
    assert await fetched(fetcher, f" http://media.example{path} ") == clip()
    host.redirects = {"/1": path}
    assert await fetched(fetcher, "http://media.example/1") == clip()
    assert host.asked_raw == [sent, "/1", sent]


async def test_paths_are_encoded_once_and_names_are_those_of_dns(fetcher, internet, host):
    internet.names.answers["xn--bcher-kva.example"] = [PUBLIC]
    host.files["/Bär 片/{a}^b.mp4"] = clip()
    for path in ("/Bär 片/{a}^b.mp4", "/B%C3%A4r%20%E7%89%87/%7Ba%7D%5Eb.mp4"):
        assert await fetched(fetcher, f"HTTP://BÜCHER.example{path}") == clip()
    assert host.asked_raw == ["/B%C3%A4r%20%E7%89%87/%7Ba%7D%5Eb.mp4"] * 2
    assert host.hosts == ["xn--bcher-kva.example"] * 2


@pytest.mark.parametrize(
    ("first", "location", "then"),
    [
        ("/a/b/1?q", "?x=%3A", "/a/b/1?x=%3A"),
        ("/a/b/1?q", "../c/clip.mp4", "/a/c/clip.mp4"),
        ("/a/b/1", "../../../clip.mp4", "/clip.mp4"),
        ("/a/b/1", "./clip.mp4?", "/a/b/clip.mp4?"),
        ("/a/b/1?x=/y", "clip.mp4", "/a/b/clip.mp4"),
        ("", "clip.mp4", "/clip.mp4"),
        ("?a=b", "/clip.mp4", "/clip.mp4"),
    ],
)
async def test_relative_redirects_lead_where_they_lead_in_browsers(fetcher, host, first, location, then):
    path = first.partition("?")[0] or "/"
    host.files[then.partition("?")[0]] = clip()
    host.redirects = {path: location}
    if then.partition("?")[0] == path:  # to itself with another query
        with pytest.raises(MediaRefused, match="redirects"):
            await fetched(fetcher, f"http://media.example{first}")
    else:
        assert await fetched(fetcher, f"http://media.example{first}") == clip()
    assert host.asked_raw[0] == (first if first.startswith("/") else f"/{first}")
    assert host.asked_raw[1] == then


def test_a_location_in_another_encoding_than_utf8_keeps_its_bytes():
    base, latin = parse_url("http://media.example/"), "/B\xe4r.mp4".encode("latin-1").decode("utf-8", "surrogateescape")
    assert str(parse_url(joined(base, latin))) == "http://media.example/B%E4r.mp4"


@pytest.mark.parametrize("encoding", ["aws-chunked", "binary", "utf-8", "identity", "", "UTF-8, aws-chunked", "none"])
async def test_an_encoding_that_is_no_compression_is_no_reason_to_refuse(fetcher, host, encoding):
    host.headers = {"content-encoding": encoding}
    assert await fetched(fetcher, "http://media.example/clip.mp4") == clip()


@pytest.mark.parametrize("encoding", ["gzip", "aws-chunked,gzip", "br", "x-gzip", "deflate", "zstd , identity"])
async def test_an_encoding_that_is_a_compression_is(fetcher, host, encoding):
    host.headers = {"content-encoding": encoding}
    assert await refused(fetcher, "http://media.example/clip.mp4") == "media_fetch_failed"


SIZE = len(clip())


@pytest.mark.parametrize(
    ("status", "content_range", "is_taken"),
    [
        (203, None, True),
        (206, f"bytes 0-{SIZE - 1}/{SIZE}", True),
        (206, f"Bytes 0-{SIZE - 1}/{SIZE}", True),
        (206, None, False),
        (206, f"bytes 0-{SIZE - 1}/*", False),
        (206, f"bytes 0-{SIZE - 1}/{SIZE + 1}", False),
        (206, f"bytes 1-{SIZE}/{SIZE + 1}", False),
        (206, f"bytes 0-{SIZE}/{SIZE + 1}", False),
        (206, "bytes 0-0/1", False),
        (201, None, False),
        (204, None, False),
    ],
)
async def test_an_answer_with_the_whole_medium_is_taken_and_a_part_is_not(
    fetcher, host, status, content_range, is_taken
):
    host.status = status
    host.headers = {} if content_range is None else {"content-range": content_range}
    if is_taken:
        assert await fetched(fetcher, "http://media.example/clip.mp4") == clip()
    else:
        assert await refused(fetcher, "http://media.example/clip.mp4") == "media_fetch_failed"


async def test_compressed_media_are_refused(host, fetcher):
    host.headers = {"content-encoding": "GZIP"}
    with pytest.raises(MediaRefused, match="compressed"):
        await fetched(fetcher, "http://media.example/clip.mp4")


async def test_media_that_say_they_are_too_large_are_refused_unread(internet):
    async with make_fetcher(internet.network, max_bytes=1000) as fetcher:
        assert await refused(fetcher, "http://media.example/clip.mp4") == "media_too_large"


async def test_a_host_that_is_not_there_or_has_nothing_is_a_refusal(fetcher, internet):
    for url in ("http://media.example:81/", "http://unknown.example/", "http://media.example/none"):
        assert await refused(fetcher, url) == "media_fetch_failed"


async def reason(fetcher, url):
    """What the error says after its first words."""
    with pytest.raises(FetchFailed, match=r"the media could not be fetched: ") as caught:
        await fetched(fetcher, url)
    return caught.value.message.partition(": ")[2]


async def test_why_a_host_did_not_deliver_is_told(fetcher, host, internet):
    internet.names.answers["away.example"] = ["9.9.9.8"]
    assert await reason(fetcher, "http://unknown.example/") == "the name of its host was not found"
    assert await reason(fetcher, "http://away.example/") == "its host refused the connection"
    for status, words in (
        (401, ", so the URL may have expired, or it needs a login"),
        (403, ", so the URL may have expired, or it needs a login"),
        (410, ", so there is nothing at this URL"),
        (418, ""),
        (503, ", try again later"),
    ):
        host.status = status
        assert await reason(fetcher, "http://media.example/clip.mp4") == f"its host answered {status}{words}"
    assert (
        await reason(fetcher, "http://media.example/none") == "its host answered 404, so there is nothing at this URL"
    )
    host.redirects = {"/1": "\\\\media.example\\"}
    assert await reason(fetcher, "http://media.example/1") == "its host redirects to an invalid URL"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "its host broke off the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf", "its host broke off the connection"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "its host did not answer in HTTP"),
    ],
)
async def test_a_host_that_breaks_off_or_speaks_otherwise_is_told_so(fetcher, internet, answer, told):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        internet.route(PUBLIC, 80, SimpleNamespace(port=server.sockets[0].getsockname()[1]))
        assert await reason(fetcher, "http://media.example/") == told


async def test_a_host_that_takes_its_time_is_told_so(internet, host):
    host.gate = asyncio.Event()
    async with make_fetcher(internet.network, total_seconds=0.2) as fetcher:
        assert (
            await reason(fetcher, "http://media.example/clip.mp4") == "its host did not deliver it within 0.2 seconds"
        )


async def test_a_host_without_a_certificate_for_its_name_is_told_so(internet):
    certificate = Path(__file__).with_name("media.example.pem")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    async with MediaHost().serving(server) as host, make_fetcher(internet.network) as fetcher:
        internet.route(PUBLIC, 443, host)
        told = await reason(fetcher, "https://media.example/clip.mp4")
    assert told == "its host has no certificate for its name that this gateway trusts"


async def test_who_waits_too_long_for_a_turn_is_told_to_come_back(internet, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_DOWNLOADS", 0)
    async with make_fetcher(internet.network, total_seconds=0.05) as fetcher:
        with pytest.raises(Overloaded, match="too many"):
            await fetched(fetcher, "http://media.example/clip.mp4")


async def test_the_systems_resolver_gives_the_addresses_that_the_system_knows():
    resolver = SystemResolver()
    try:
        answers = await resolver.resolve("localhost", 80)
        assert {answer["host"] for answer in answers} <= {"127.0.0.1", "::1"}
        assert answers[0]["port"] == 80
    finally:
        await resolver.close()


async def test_the_systems_localhost_is_not_fetched_from():
    internet = Internet()
    resolver = SystemResolver()
    async with make_fetcher(Network(resolver, internet.network.new_socket)) as fetcher:
        assert await refused(fetcher, "http://localhost/clip.mp4") == "media_host_not_allowed"
    await resolver.close()
    assert internet.dialled == []
