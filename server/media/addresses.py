"""Decides which IP addresses are on the public Internet. Media are fetched from no others (SSRF protection)."""

import ipaddress

_NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "168.63.129.16/32",  # Azure's metadata service, although the address is public
        "192.0.0.0/24",  # protocol assignments, with Oracle's metadata service; older Pythons call a part of it global
        "192.88.99.0/24",  # 6to4 relays
        "224.0.0.0/4",  # multicast
    )
)
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")  # the only block from which global unicast addresses are allocated
_NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, with Teredo, whose addresses may embed any IPv4 address
        "2002::/16",  # 6to4, whose addresses may embed any IPv4 address
        "3fff::/20",  # documentation
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return whether `address`, in canonical spelling, is a global unicast address.

    For an IPv6 address that embeds an IPv4 address (IPv4-mapped or NAT64), the embedded address decides.
    """
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
