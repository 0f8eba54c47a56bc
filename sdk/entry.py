"""Entry point of the command."""

from __future__ import annotations

import signal


def main() -> None:
    """`cli.main`; until it is imported, Ctrl-C ends the process without a traceback, as SIGTERM does."""
    early = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, and stays so
    if early:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as command

    if early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()
