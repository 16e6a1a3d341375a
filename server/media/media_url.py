"""Parses media URLs. Their path and query are asked for byte by byte as given: a signature may depend on each byte."""

import re
from typing import Final
from urllib.parse import quote

import yarl

_URL = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>[^#]*)", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(?::[0-9]{0,5})?")
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")  # hosts that some resolvers read as an IPv4 address
_IPV4 = re.compile(r"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})")
_NO_UTF8 = re.compile("[\udc80-\udcff]")
# What browsers leave alone (WHATWG's percent-encode sets of path and query), besides letters and digits. They encode
# an apostrophe in a query, but a signature over the URL may hold with the apostrophe alone.
_IN_PATH: Final = "%!$&'()*+,-./:;=@[]_|~"
_IN_QUERY: Final = _IN_PATH + "?`{}^"


class BadURL(ValueError):
    """The URL can't be used. The message goes on after "the media URL"."""


def parse_url(url: str) -> yarl.URL:
    """Return a URL without its fragment, in the form in which it is asked for.

    Its host is in lower case and in the letters of DNS, spaces and other characters that a URL can't hold are encoded,
    and the rest stays byte by byte. Raises BadURL for a URL that is not http or https, or that two parsers could read
    in two ways.
    """
    if any(character < " " or character in "\\\x7f" for character in url):
        raise BadURL("holds backslashes or control characters")
    found = _URL.match(url.strip(" "))
    if found is None or not found["authority"]:
        raise BadURL("must be an https URL")
    if "@" in found["authority"]:
        raise BadURL("must not hold a user name or password")
    host = _authority(found["authority"])
    try:
        path, query = quote(found["path"], safe=_IN_PATH), quote(found["query"], safe=_IN_QUERY)
        # The query belongs to the path, so that a bare `?` stays too.
        return yarl.URL.build(scheme=found["scheme"].lower(), authority=host, path=(path or "/") + query, encoded=True)
    except ValueError as exc:  # for example a lone surrogate
        raise BadURL("can't be parsed") from exc


def joined(base: yarl.URL, location: str) -> str:
    """Return the URL that `location`, an answer's header, leads to from `base`, in the bytes of the location.

    Raises BadURL for a location with a backslash, which some read as a slash.
    """
    location = _NO_UTF8.sub(lambda found: f"%{ord(found[0]) - 0xDC00:02X}", location)
    if "\\" in location:
        raise BadURL("redirects to an invalid URL")
    if _SCHEME.match(location):
        return location
    if location.startswith("//"):
        return f"{base.scheme}:{location}"
    path, mark, query = base.raw_path.partition("?")
    origin = f"{base.scheme}://{base.raw_authority}"
    if location.startswith("/"):
        return origin + location
    if location.startswith("?"):
        return origin + path + location
    if not location or location.startswith("#"):
        return origin + path + mark + query
    return origin + _without_dots(path[: path.rindex("/") + 1], location)


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    return ":" in host or bool(_IPV4.fullmatch(host))


def _authority(given: str) -> str:
    """Return the host, in lower case and without a dot at its end, with the port if there is one."""
    try:
        origin = yarl.URL(f"http://{given}/")
        host = (origin.raw_host or "").lower().removesuffix(".")
        is_usable = bool(_AUTHORITY.fullmatch(given) and origin.port and _is_host(host))
    except ValueError:
        is_usable = False
    if not is_usable:
        raise BadURL("can't be parsed")
    name = f"[{host}]" if ":" in host else host
    return name if origin.explicit_port is None else f"{name}:{origin.explicit_port}"


def _is_host(host: str) -> bool:
    if ":" in host:
        return True
    if _NUMBER.fullmatch(host):
        return bool(_IPV4.fullmatch(host))
    return len(host) <= 253 and bool(_NAME.fullmatch(host))


def _without_dots(folder: str, location: str) -> str:
    """Return the path of a location relative to `folder`; leading `.` and `..` are applied."""
    while True:
        if location.startswith("./"):
            location = location[2:]
        elif location.startswith("../"):
            location, folder = location[3:], folder[: folder.rindex("/", 0, -1) + 1] if folder != "/" else "/"
        else:
            return folder + location
