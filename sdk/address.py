"""Which addresses stay on this machine."""

from __future__ import annotations

import ipaddress

from swiftvideo.runtime.errors import SettingsError

SOCKETS = ("unix:", "unix-abstract:")
"""How targets begin that are no hosts."""


def is_loopback(host: str) -> bool:
    """Whether a host, without a port, is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_target(target: str) -> None:
    """Raise SettingsError for a server's address that gRPC would take for another one, or say nothing useful of."""
    if not isinstance(target, str) or not target.strip():
        raise SettingsError(
            f"the server's address is {target!r}: give HOST:PORT, such as localhost:50051, as a text"
        )
    scheme, found, _ = target.partition("://")
    if found and scheme.lower() in ("http", "https", "grpc", "grpcs"):
        raise SettingsError(
            f"the server's address is {target!r}: give HOST:PORT alone, and say elsewhere whether it has TLS (--tls, "
            "tls=True)"
        )
    for name in _names(target):
        host = _host(name)
        port = name[len(host) :].removeprefix(":")
        if not port and name == target:  # gRPC would take 443; who writes dns:///HOST knows
            raise SettingsError(f"{name!r} has no port: give HOST:PORT, such as localhost:50051")
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
            raise SettingsError(f"the port of {name!r} is {port!r}: use 1 to 65535")


def is_local(target: str) -> bool:
    """Whether what is sent to a gRPC target stays on this machine: a socket file, or loopback addresses alone.

    https://github.com/grpc/grpc/blob/master/doc/naming.md
    """
    if target.startswith(SOCKETS):
        return True
    return all(is_loopback(_host(name)) for name in _names(target))


def _names(target: str) -> list[str]:
    """Hosts of a target, with their ports."""
    if target.startswith(SOCKETS):
        return []
    scheme, _, rest = target.partition(":")
    return (rest.removeprefix("///") if scheme in ("dns", "ipv4", "ipv6") else target).split(",")


def _host(name: str) -> str:
    """Of host, host:port, [host]:port or an IPv6 address alone."""
    bare = name.count(":") > 1 and not name.startswith("[")
    return name if bare or name.endswith("]") else name.rpartition(":")[0] or name
