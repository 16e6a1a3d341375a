"""Downloads from public hosts and from those the operator lists, within limits of size and time."""

import asyncio
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
from server.media.threads import off_loop

MAX_REDIRECTS = 3
MAX_DOWNLOADS = 64  # at a time; each may take a file of media_max_bytes
READ_BYTES = 2**20
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")
_END_OF_AUTHORITY = re.compile(r"[/?#]")
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(?::[0-9]{0,5})?")
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")  # hosts that some part of a system reads as an IPv4 address
_IPV4 = re.compile(r"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})")


@dataclass(frozen=True)
class HostRules:
    """Which hosts media may come from. `deny` and `only` name hosts that stand for their subdomains too."""

    allow: frozenset[str] = frozenset()
    """Exceptions to the rule that addresses are public: `host:port`, or `host` at its scheme's own port."""
    deny: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    """If not empty, nothing else is fetched from but what `allow` lists."""

    def excepts(self, url: yarl.URL) -> bool:
        """Return whether the operator vouches for the host at this port, whatever its address."""
        name = url.host_subcomponent or ""
        return f"{name}:{url.port}" in self.allow or (url.port == _DEFAULT_PORTS[url.scheme] and name in self.allow)

    def refuses(self, url: yarl.URL) -> bool:
        """Return whether the lists keep the host from being fetched from."""
        name = url.host_subcomponent or ""
        domains = (
            {name} if name.startswith("[") else {name[i:] for i in range(len(name)) if i == 0 or name[i - 1] == "."}
        )
        if not domains.isdisjoint(self.deny):
            return True
        return bool(self.only) and domains.isdisjoint(self.only) and not self.excepts(url)


AddressInfo = tuple[int, int, int, str, tuple[object, ...]]


def new_socket(info: AddressInfo) -> socket.socket:
    """Return a socket that fits an address."""
    family, kind, protocol, _, _ = info
    return socket.socket(family, kind, protocol)


class SystemResolver(AbstractResolver):
    """Asks the operating system, in threads of its own: names that answer slowly hold up nothing but downloads."""

    def __init__(self) -> None:
        """Start no thread until there is a name to resolve."""
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
        """End the threads once they have their answers."""
        self._threads.shutdown(wait=False)


class _PublicOnly(AbstractResolver):
    """Gives the answers of another resolver if all of them are public; one that is not may be a trap."""

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
        """Leave the inner resolver to who made it."""


@dataclass(frozen=True)
class Network:
    """What lies below the rule about addresses: name resolution, the sockets that connect, whom TLS trusts."""

    resolver: AbstractResolver
    new_socket: Callable[[AddressInfo], socket.socket] = new_socket
    tls: ssl.SSLContext | bool = True


class Fetcher:
    """Downloads a URL if the rules allow its host and that of every URL it redirects to.

    It connects from when its block is entered until it is left. Each connection looks its host up once and goes to one
    of the addresses that were checked; at the socket, through which literal addresses pass too, they are checked again.
    No proxy of the environment is used: it would look up for itself. Nothing is unpacked: the bytes on the wire are
    those that are counted.
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
        """Bound each download by bytes and seconds, and the wait for its turn by the same seconds.

        `network` is the machine's own by default.
        """
        self._rules = rules
        self._schemes = ("https", "http") if allow_http else ("https",)
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._network = network
        self._turns = asyncio.Semaphore(MAX_DOWNLOADS)

    async def __aenter__(self) -> Self:
        """Open the session for public addresses, and the one for hosts that the operator vouches for."""
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
        """Write what `url` holds into `file`.

        Raises MediaRefused if it is not allowed, not there, too large or too slow, and Overloaded if too many others
        are being fetched.
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
                f"the media was not delivered within {self._total_seconds:g} seconds", code="media_timeout"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # ValueError: headers no parser of URLs was made for
            raise FetchFailed("the media could not be fetched: its host did not deliver it") from exc
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
        """Return the URL parsed, as it will be dialled; raise MediaRefused if it may not be."""
        if any(character <= " " or character in "\\\x7f" for character in url):
            raise _refused("the media URL holds spaces, backslashes or control characters", "invalid_media_url")
        authority = _END_OF_AUTHORITY.split(url.partition("//")[2], maxsplit=1)[0]
        if "@" in authority:
            raise _refused("the media URL must not hold a user name or password", "invalid_media_url")
        try:
            parsed = yarl.URL(url)
            if parsed.scheme not in _DEFAULT_PORTS or not parsed.raw_host:
                raise _refused("the media URL must be an https URL", "invalid_media_url")
            parsed = parsed.with_host(parsed.raw_host.lower().removesuffix(".")).with_fragment(None)
            is_usable = bool(_AUTHORITY.fullmatch(authority) and parsed.port and _is_host(parsed.raw_host or ""))
        except ValueError:
            is_usable = False
        if not is_usable:
            raise _refused("the media URL can't be parsed", "invalid_media_url")
        if self._rules.refuses(parsed):
            raise _refused("the media URL's host is not one that this gateway fetches from", "media_host_not_allowed")
        if (
            _is_address(parsed.raw_host or "")
            and not is_public(parsed.raw_host or "")
            and not self._rules.excepts(parsed)
        ):
            raise _not_public()
        if parsed.scheme not in self._schemes:
            raise _refused(
                "the media URL must be https: AOT_GATEWAY_MEDIA_ALLOW_HTTP is off", "media_scheme_not_allowed"
            )
        return parsed

    async def _get(self, url: yarl.URL, file: MediaFile) -> str | None:
        """Write the content, or return the URL that the host redirects to."""
        session = self._excepted if self._rules.excepts(url) else self._public
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECTS:
                location = answer.headers.get("location", "")
                if "\\" in location:
                    raise FetchFailed("the media could not be fetched: its host redirects to no URL")
                return str(url.join(yarl.URL(location)))
            if answer.status != 200:
                raise FetchFailed(f"the media could not be fetched: its host answered {answer.status}")
            if answer.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
                raise FetchFailed("the media could not be fetched: its host sent it compressed")
            if (answer.content_length or 0) > self._max_bytes:
                raise too_large(self._max_bytes)
            async for piece in answer.content.iter_chunked(READ_BYTES):
                await off_loop(file.write, piece, size_bytes=len(piece))
        return None


def _is_host(host: str) -> bool:
    if ":" in host:
        return True
    if _NUMBER.fullmatch(host):
        return bool(_IPV4.fullmatch(host))
    return len(host) <= 253 and bool(_NAME.fullmatch(host))


def _is_address(host: str) -> bool:
    return ":" in host or bool(_IPV4.fullmatch(host))


def _not_public() -> MediaRefused:
    return _refused(
        "the media URL's host is not on the public Internet, and AOT_GATEWAY_MEDIA_ALLOW_HOSTS does not list it",
        "media_host_not_allowed",
    )


def _refused(message: str, code: str) -> MediaRefused:
    return MediaRefused(message, code=code)
