"""How many connections the process's limit of open files leaves a server."""

from __future__ import annotations

import logging
import resource

from . import endpoint

log = logging.getLogger(__name__)

OTHERS = 128 + endpoint.CONNECTIONS
"""Descriptors that no connection may take: of /metrics, snapshots, the log, a GPU's driver, threads of gRPC."""


def connections(wanted: int) -> int:
    """`wanted`, or as many as there are descriptors for, and the log says so.

    Beyond them snapshots could not be written, nor /metrics be read, while strangers hold connections.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = max(1, limit - OTHERS)
    if limit == resource.RLIM_INFINITY or wanted <= room:
        return wanted
    log.warning(
        "this process may open %d files, which is room for %d connections and not for the %d of max_connections: let "
        "it open %d (ulimit -n, LimitNOFILE=)",
        limit,
        room,
        wanted,
        wanted + OTHERS,
    )
    return room
