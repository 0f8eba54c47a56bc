"""Limits of the protocol, which clients and servers know alike (protos/swiftvideo/v1/generation.proto)."""

from __future__ import annotations

MAX_TEXT = 4096
"""Bytes of a prompt."""
MAX_ID = 64
"""Bytes of a client's name for a prompt."""
MAX_PROMPTS = 64
"""Prompts that a client keeps, to say them again in a reattach."""
MAX_REQUEST = 320 * 1024
"""Bytes of a request: a reattach with `MAX_PROMPTS` of the longest prompts fits."""
