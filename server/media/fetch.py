"""Downloads from the hosts the operator allows, within limits of size and time."""

import asyncio

import aiohttp
import yarl

from server.errors import MediaRefused

MAX_REDIRECTS = 3
MAX_DOWNLOADS = 16  # at a time; each may hold media_max_bytes
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Fetcher:
    """Downloads a URL if it and every URL it redirects to is on an allowed host."""

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        allow_hosts: tuple[str, ...],
        allow_http: bool,
        max_bytes: int,
        total_seconds: float,
    ) -> None:
        """Allow `host:port`, or `host` at its scheme's own port."""
        self._session = session
        self._allow_hosts = frozenset(allow_hosts)
        self._schemes = ("https", "http") if allow_http else ("https",)
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds
        self._downloads = asyncio.Semaphore(MAX_DOWNLOADS)

    async def fetch(self, url: str) -> bytes:
        """Return what `url` holds; raise MediaRefused if it is not allowed, not there, too large or too slow."""
        target = self.check(url)
        try:
            async with self._downloads, asyncio.timeout(self._total_seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    found = await self._get(target)
                    if isinstance(found, bytes):
                        return found
                    target = self.check(found)
        except TimeoutError:
            raise _refused(
                f"the media was not delivered within {self._total_seconds:g} seconds", "media_timeout"
            ) from None
        except (aiohttp.ClientError, OSError) as exc:
            raise _refused("the media could not be fetched: its host did not deliver it") from exc
        raise _refused(f"the media could not be fetched: more than {MAX_REDIRECTS} redirects")

    def check(self, url: str) -> yarl.URL:
        """Return the URL parsed, as it will be dialled; raise MediaRefused if it may not be."""
        if any(character <= " " or character in "\\\x7f" for character in url):
            raise _refused("the media URL holds spaces, backslashes or control characters", "invalid_media_url")
        try:
            parsed = yarl.URL(url)
            host, port = (parsed.raw_host or "").lower(), parsed.port
        except ValueError:
            raise _refused("the media URL can't be parsed", "invalid_media_url") from None
        if not host or parsed.scheme not in _DEFAULT_PORTS:
            raise _refused("the media URL must be an https URL", "invalid_media_url")
        if parsed.user is not None or parsed.password is not None:
            raise _refused("the media URL must not hold a user name or password", "invalid_media_url")
        if not self._allow_hosts:
            raise _refused(
                "this gateway fetches no media: its AOT_GATEWAY_MEDIA_ALLOW_HOSTS is empty; send a base64 data URL",
                "media_host_not_allowed",
            )
        name = f"[{host}]" if ":" in host else host
        is_default = port == _DEFAULT_PORTS[parsed.scheme]
        if f"{name}:{port}" not in self._allow_hosts and not (is_default and name in self._allow_hosts):
            raise _refused(
                "the media URL's host is not one that AOT_GATEWAY_MEDIA_ALLOW_HOSTS lists", "media_host_not_allowed"
            )
        if parsed.scheme not in self._schemes:
            raise _refused(
                "the media URL must be https: AOT_GATEWAY_MEDIA_ALLOW_HTTP is off", "media_scheme_not_allowed"
            )
        return parsed

    async def _get(self, url: yarl.URL) -> bytes | str:
        """Return the content, or the URL that the host redirects to."""
        async with self._session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECTS:
                try:
                    return str(url.join(yarl.URL(answer.headers.get("location", ""))))
                except ValueError:
                    raise _refused("the media could not be fetched: its host redirects to no URL") from None
            if answer.status != 200:
                raise _refused(f"the media could not be fetched: its host answered {answer.status}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise _refused("the media could not be fetched: its host sent it compressed")
            if (answer.content_length or 0) > self._max_bytes:
                raise self._too_large()
            pieces, size = [], 0
            async for piece in answer.content.iter_any():
                size += len(piece)
                if size > self._max_bytes:
                    raise self._too_large()
                pieces.append(piece)
            return b"".join(pieces)

    def _too_large(self) -> MediaRefused:
        return _refused(f"the media is larger than {self._max_bytes} bytes", "media_too_large")


def new_session(*, connect_seconds: float) -> aiohttp.ClientSession:
    """Return a session that sends no cookies and unpacks nothing: the bytes on the wire are those that are counted."""
    return aiohttp.ClientSession(
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"accept-encoding": "identity", "user-agent": "aot-gateway"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
    )


def _refused(message: str, code: str = "media_fetch_failed") -> MediaRefused:
    return MediaRefused(message, code=code)
