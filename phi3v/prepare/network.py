"""Connections to addresses that may be fetched from, each bounded by the time of a whole try.

Rows may name hosts that strangers chose, so addresses of this machine and of its private network
are refused unless `fetch.allow_private` is set. A name is looked up once per connection, and the
very address that passed the check is connected to: a second look-up could give another. This is
also why proxies of the environment (HTTPS_PROXY) are not used: what lies behind one cannot be
checked. Where a cluster's nodes have no way out, fetch on a machine that has one.

The look-up of a name is bounded by nothing but the resolver's own time-out.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

import httpcore

CONNECT_SECONDS = 5.0  # for one address of a host; of `fetch.timeout`
NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}
UNICAST = IPv6Network("2000::/3")  # all that is given to networks of the internet
NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits

# What is of no host of the internet at large: every entry of IANA's registries of special-purpose
# addresses (iana-ipv4-special-registry, iana-ipv6-special-registry; the former's anycast services
# too, for they serve no images), multicast, and what clouds answer at besides. The table is our
# own, for what `ipaddress` takes for global depends on the version of Python (CVE-2024-4032).
SPECIAL_IPV4 = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carriers' own; Alibaba's metadata at 100.100.100.200
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's services inside a virtual machine
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols' own; Oracle's metadata at 192.0.0.192
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
SPECIAL_IPV6 = [  # of UNICAST; all outside of it is special
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocols' own: Teredo, benchmarks, AMT, AS112, ORCHID
        "2001:db8::/32",  # documentation
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]


class Refused(Exception):
    """No connection is made: the reason, and the particulars."""


def is_public(address: str) -> bool:
    """Whether an IP address is of the internet at large.

    ::ffff:10.0.0.7, 2002:a00:7:: and 64:ff9b::a00:7 all lead to 10.0.0.7, which is not.
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or _behind_nat64(ip) or ip
    if isinstance(ip, IPv6Address):
        return ip in UNICAST and not any(ip in network for network in SPECIAL_IPV6)
    return not any(ip in network for network in SPECIAL_IPV4)


def _behind_nat64(ip: IPv6Address) -> IPv4Address | None:
    return IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None


class Network(httpcore.NetworkBackend):
    """Connects to allowed addresses only; each thread's try ends when its clock has run down."""

    def __init__(self, is_allowed: Callable[[str], bool]) -> None:
        self.is_allowed = is_allowed
        self.sockets = httpcore.SyncBackend()
        self.clock = threading.local()

    def start_clock(self, seconds: float) -> None:
        """Begin a try of this thread."""
        self.clock.end = time.monotonic() + seconds

    def seconds_left(self) -> float:
        """Seconds that this thread's try may still take.

        Raises: httpcore.ReadTimeout if there are none.
        """
        left: float = self.clock.end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the try's time is over")
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _look_up(host, port)
        allowed = [address for address in addresses if self.is_allowed(address)]
        if not allowed:
            particulars = f"{addresses[0]}; to fetch from it, set fetch.allow_private"
            raise Refused("image URL leads to a private address", particulars)
        for address in allowed[:-1]:
            try:
                return self._connect(address, port)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # the host's next address; what the last one says is told
        return self._connect(allowed[-1], port)

    def _connect(self, address: str, port: int) -> httpcore.NetworkStream:
        seconds = min(CONNECT_SECONDS, self.seconds_left())
        return _Stream(self.sockets.connect_tcp(address, port, seconds), self)


def _look_up(host: str, port: int) -> list[str]:
    """The IP addresses of a host, in the resolver's order."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in NO_SUCH_NAME:
            raise Refused("image URL cannot be reached", "no host has this name") from error
        raise httpcore.ConnectError(error) from error
    return [str(address[0]) for *_, address in found]


class _Stream(httpcore.NetworkStream):
    """A connection whose every wait is bounded by what is left of its thread's try.

    The library's own time-outs are for one wait each: a byte a second would never meet one.
    """

    def __init__(self, inner: httpcore.NetworkStream, network: Network) -> None:
        self.inner, self.network = inner, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, self.network.seconds_left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, self.network.seconds_left())

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        seconds = self.network.seconds_left()
        return _Stream(self.inner.start_tls(ssl_context, server_hostname, seconds), self.network)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)
