"""Downloads media from public hosts, and from hosts that the operator allows, within limits of size and time."""

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from server.errors import FetchFailed, MediaRefused, Overloaded
from server.media.addresses import is_public
from server.media.file import MediaFile, too_large
from server.media.media_url import BadURL, is_address, joined, parse_url
from server.media.threads import off_loop

MAX_REDIRECTS = 3
MAX_DOWNLOADS = 64  # at the same time; each may write a file of media_max_bytes
READ_BYTES = 2**20
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_COMPRESSIONS = frozenset(
    {"gzip", "x-gzip", "compress", "x-compress", "deflate", "br", "zstd", "dcb", "dcz", "exi", "bzip2", "lzma", "xz"}
)
_WHOLE_RANGE = re.compile(r"bytes\s+0-([0-9]{1,15})/([0-9]{1,15})", re.IGNORECASE)


@dataclass(frozen=True)
class HostRules:
    """The hosts that media may come from. A host in `deny` or `only` includes its subdomains."""

    allow: frozenset[str] = frozenset()
    """Hosts whose addresses need not be public: `host:port`, or `host` for the default port of the URL's scheme."""
    deny: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    """If not empty, media are fetched only from these hosts and from those in `allow`."""

    def excepts(self, url: yarl.URL) -> bool:
        """Return whether `allow` lists the URL's host and port, so that its address need not be public."""
        name = url.host_subcomponent or ""
        return f"{name}:{url.port}" in self.allow or (url.port == _DEFAULT_PORTS[url.scheme] and name in self.allow)

    def refuses(self, url: yarl.URL) -> bool:
        """Return whether `deny` or `only` forbids the URL's host."""
        name = url.host_subcomponent or ""
        domains = (
            {name} if name.startswith("[") else {name[i:] for i in range(len(name)) if i == 0 or name[i - 1] == "."}
        )
        if not domains.isdisjoint(self.deny):
            return True
        return bool(self.only) and domains.isdisjoint(self.only) and not self.excepts(url)


AddressInfo = tuple[int, int, int, str, tuple[object, ...]]


def new_socket(info: AddressInfo) -> socket.socket:
    """Return an unconnected socket for an address."""
    family, kind, protocol, _, _ = info
    return socket.socket(family, kind, protocol)


class SystemResolver(AbstractResolver):
    """Resolves names with the operating system, in a thread pool of its own.

    Names that resolve slowly therefore delay only other downloads, and no other work in threads.
    """

    def __init__(self) -> None:
        """Create the pool. Its threads start on demand."""
        self._threads = ThreadPoolExecutor(MAX_DOWNLOADS, thread_name_prefix="resolver")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return all addresses of `host`; raise OSError if there are none."""
        infos = await asyncio.get_running_loop().run_in_executor(
            self._threads, socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG
        )
        return [
            ResolveResult(hostname=host, host=str(at[0]), port=port, family=kind, proto=proto, flags=0)
            for kind, _, proto, _, at in infos
        ]

    async def close(self) -> None:
        """Stop the threads, without waiting for look-ups that are still running."""
        self._threads.shutdown(wait=False)


class _PublicOnly(AbstractResolver):
    """Refuses a host if any of its addresses is not public, because a mixed answer may be a trap (DNS rebinding)."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        answers = await self._inner.resolve(host, port, family)
        if not all(is_public(answer["host"]) for answer in answers):
            raise _not_public()
        return answers

    async def close(self) -> None:
        """Do nothing: whoever created the inner resolver closes it."""


@dataclass(frozen=True)
class Network:
    """The network below the rule about addresses: name resolution, sockets, and the certificates that TLS trusts.

    Tests replace it, to test the rule itself.
    """

    resolver: AbstractResolver
    new_socket: Callable[[AddressInfo], socket.socket] = new_socket
    tls: ssl.SSLContext | bool = True


class Fetcher:
    """Downloads a URL, if the rules allow its host and the host of every redirect. Open while its block lasts.

    Each connection resolves its host once, and dials one of the addresses that were checked. The socket checks the
    address again, because URLs with a literal address are never resolved. Proxies from the environment are not used,
    because a proxy would resolve the host again. Content is not decompressed, so the size limit counts the bytes that
    are written.
    """

    def __init__(
        self,
        *,
        rules: HostRules,
        allow_http: bool,
        max_bytes: int,
        total_seconds: float,
        network: Network | None = None,
    ) -> None:
        """Limit each download to `max_bytes` and `total_seconds`. The wait for a download slot has the same time limit.

        `network` is by default the machine's own.
        """
        self._rules = rules
        self._schemes = ("https", "http") if allow_http else ("https",)
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._network = network
        self._turns = asyncio.Semaphore(MAX_DOWNLOADS)

    async def __aenter__(self) -> Self:
        """Open two sessions: one for public addresses, and one for the hosts in `allow`."""
        async with AsyncExitStack() as stack:
            network = self._network
            if network is None:
                network = Network(SystemResolver())
                stack.push_async_callback(network.resolver.close)

            def public_socket(info: AddressInfo) -> socket.socket:
                if not is_public(str(info[4][0])):
                    raise PermissionError("not a public address")
                return network.new_socket(info)

            self._public = await stack.enter_async_context(
                self._session(network, _PublicOnly(network.resolver), public_socket)
            )
            self._excepted = await stack.enter_async_context(
                self._session(network, network.resolver, network.new_socket)
            )
            self._opened = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the sessions."""
        await self._opened.aclose()

    def _session(
        self, network: Network, resolver: AbstractResolver, new_socket: Callable[[AddressInfo], socket.socket]
    ) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=resolver,
                socket_factory=new_socket,
                use_dns_cache=False,
                force_close=True,
                limit=0,
                ssl=network.tls,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept-encoding": "identity", "user-agent": "aot-gateway"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._total_seconds),
            read_bufsize=READ_BYTES,
            trust_env=False,
        )

    async def fetch(self, url: str, file: MediaFile) -> None:
        """Download `url` into `file`.

        Raises MediaRefused if the URL is not allowed or the file is too large, FetchFailed if the host does not deliver
        the file in time, and Overloaded if no download slot becomes free in time.
        """
        target = self.check(url)
        try:
            async with asyncio.timeout(self._total_seconds):
                await self._turns.acquire()
        except TimeoutError:
            raise Overloaded("too many media are being fetched, try again later") from None
        try:
            async with asyncio.timeout(self._total_seconds):
                await self._follow(target, file)
        except TimeoutError:
            raise FetchFailed(
                f"the media could not be fetched: its host did not deliver it within {self._total_seconds:g} seconds",
                code="media_timeout",
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # ValueError: a redirect to a malformed URL
            raise FetchFailed(f"the media could not be fetched: {_reason_of(exc)}") from exc
        finally:
            self._turns.release()

    async def _follow(self, target: yarl.URL, file: MediaFile) -> None:
        for _ in range(MAX_REDIRECTS + 1):
            onward = await self._get(target, file)
            if onward is None:
                return
            target = self.check(onward)
        raise FetchFailed(f"the media could not be fetched: more than {MAX_REDIRECTS} redirects")

    def check(self, url: str) -> yarl.URL:
        """Return the parsed URL in the form in which it will be requested; raise MediaRefused if it is not allowed."""
        try:
            parsed = parse_url(url)
        except BadURL as exc:
            raise _refused(f"the media URL {exc}", "invalid_media_url") from exc
        host = parsed.raw_host or ""
        if self._rules.refuses(parsed):
            raise _refused("the media URL's host is not one that this gateway fetches from", "media_host_not_allowed")
        if is_address(host) and not is_public(host) and not self._rules.excepts(parsed):
            raise _not_public()
        if parsed.scheme not in self._schemes:
            raise _refused(
                "the media URL must be https: AOT_GATEWAY_MEDIA_ALLOW_HTTP is off", "media_scheme_not_allowed"
            )
        return parsed

    async def _get(self, url: yarl.URL, file: MediaFile) -> str | None:
        """Download `url` into `file` and return None, or return the URL that its host redirects to."""
        session = self._excepted if self._rules.excepts(url) else self._public
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECTS:
                return joined(url, answer.headers.get("location", ""))
            size_bytes = _announced_size(answer)
            if (answer.content_length or 0) > self._max_bytes:
                raise too_large(self._max_bytes)
            async for piece in answer.content.iter_chunked(READ_BYTES):
                await off_loop(file.write, piece, size_bytes=len(piece))
        if size_bytes not in (None, file.size_bytes):
            raise FetchFailed("the media could not be fetched: its host sent only a part of it")
        return None


def _announced_size(answer: aiohttp.ClientResponse) -> int | None:
    """Return the size of the whole medium if the answer's range says it.

    Raises FetchFailed if the answer is not the whole medium, as it is.
    """
    if answer.status not in (200, 203, 206):
        raise FetchFailed(f"the media could not be fetched: its host answered {answer.status}{_hint(answer.status)}")
    encodings = {name.strip() for name in answer.headers.get("content-encoding", "").lower().split(",")}
    if not encodings.isdisjoint(_COMPRESSIONS):
        raise FetchFailed("the media could not be fetched: its host sent it compressed")
    if answer.status != 206:
        return None
    sent = _WHOLE_RANGE.fullmatch(answer.headers.get("content-range", "").strip())
    if sent is None or int(sent[1]) + 1 != int(sent[2]):
        raise FetchFailed("the media could not be fetched: its host sent only a part of it")
    return int(sent[2])


def _hint(status: int) -> str:
    if status in (401, 403):
        return ", so the URL may have expired, or it needs a login"
    if status in (404, 410):
        return ", so there is nothing at this URL"
    return ", try again later" if status == 429 or status >= 500 else ""


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (BadURL, "its host redirects to an invalid URL"),
    (aiohttp.ClientConnectorDNSError, "the name of its host was not found"),
    (aiohttp.ClientSSLError, "its host has no certificate for its name that this gateway trusts"),
    (aiohttp.ServerDisconnectedError, "its host broke off the connection"),
    (aiohttp.ClientPayloadError, "its host broke off the connection"),
    (aiohttp.ClientResponseError, "its host did not answer in HTTP"),
)
_CONNECTION_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (ConnectionRefusedError, "its host refused the connection"),
    (ConnectionResetError, "its host broke off the connection"),
)


def _reason_of(exc: Exception) -> str:
    """Return why a host did not deliver."""
    cause = exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc
    for kinds, failure in ((_REASONS, exc), (_CONNECTION_REASONS, cause)):
        for kind, reason in kinds:
            if isinstance(failure, kind):
                return reason
    if isinstance(cause, OSError) and cause.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "its host can't be reached"
    return "its host did not deliver it"


def _not_public() -> MediaRefused:
    return _refused(
        "the media URL's host is not on the public Internet, and AOT_GATEWAY_MEDIA_ALLOW_HOSTS does not list it",
        "media_host_not_allowed",
    )


def _refused(message: str, code: str) -> MediaRefused:
    return MediaRefused(message, code=code)
