"""Which addresses are on the public Internet. The rule media are fetched by: nothing else is ever dialled."""

import ipaddress

_NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "168.63.129.16/32",  # Azure's metadata, on a public address
        "192.0.0.0/24",  # protocol assignments, Oracle's metadata among them; in part global to older Pythons
        "192.88.99.0/24",  # relays of 6to4
        "224.0.0.0/4",  # multicast
    )
)
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")  # all that has ever been given out as global unicast
_NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them: it carries any IPv4 address
        "2002::/16",  # 6to4: it carries any IPv4 address
        "3fff::/20",  # documentation
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return whether `address`, in canonical spelling, is a global unicast one; of IPv6 that carries IPv4, both are."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.scope_id is not None:
            return False
        carried = parsed.ipv4_mapped
        if carried is None and parsed in _NAT64:
            carried = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if carried is None:
            return parsed.is_global and parsed in _PUBLIC_6 and not any(parsed in network for network in _NOT_PUBLIC_6)
        parsed = carried
    return parsed.is_global and not any(parsed in network for network in _NOT_PUBLIC_4)
