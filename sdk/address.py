"""Which addresses stay on this machine."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, without a port, is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local(target: str) -> bool:
    """Whether what is sent to a gRPC target stays on this machine: a socket file, or loopback addresses alone.

    https://github.com/grpc/grpc/blob/master/doc/naming.md
    """
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    names = rest.removeprefix("///") if scheme in ("dns", "ipv4", "ipv6") else target
    return all(is_loopback(_host(name)) for name in names.split(","))


def _host(name: str) -> str:
    """Of host, host:port, [host]:port or an IPv6 address alone."""
    bare = name.count(":") > 1 and not name.startswith("[")
    return name if bare or name.endswith("]") else name.rpartition(":")[0] or name
