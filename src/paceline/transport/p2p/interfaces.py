"""Network interfaces by address: gloo is told an interface to listen on, people know addresses."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct

from paceline.transport.negotiation import TransportRefused

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_NAME_BYTES = 16
_ADDRESS = slice(20, 24)


def is_loopback(address: str) -> bool:
    """Whether only processes of this host can reach the address."""
    return ipaddress.ip_address(address).is_loopback


def resolve(host: str) -> str:
    """The IPv4 address of a host name.

    Raises:
        TransportRefused: it has none.
    """
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise TransportRefused(f"{host} has no IPv4 address: {error}") from error
    return str(found[0][4][0])


def address_towards(address: str) -> str:
    """This host's own address on the way to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # any port: a datagram socket only looks up the route
        except OSError as error:
            raise TransportRefused(f"there is no way to {address}: {error}") from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The interface that has this IPv4 address.

    Raises:
        TransportRefused: none of this host has it.
    """
    known = {}
    for _, name in socket.if_nameindex():
        found = _ipv4_of(name)
        if found == address:
            return name
        known[name] = found
    listed = ", ".join(f"{name} {found}" for name, found in known.items() if found)
    raise TransportRefused(f"no interface of this host has the address {address}: it has {listed}")


def _ipv4_of(name: str) -> str | None:
    request = array.array("B", struct.pack("256s", name.encode()[: _NAME_BYTES - 1]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:  # an interface without an IPv4 address
            return None
    return socket.inet_ntoa(request.tobytes()[_ADDRESS])
