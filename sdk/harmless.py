"""Text from files and servers, as a terminal may show it."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: object) -> str:
    """`str(text)` with its control characters as Python writes them: they could move the cursor, erase what was said
    or retitle the window. Tabs and ends of lines stay."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], str(text))
