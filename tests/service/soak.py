"""The service under load and faults, at full size: figures as JSON, exit code 1 where one misses its bound.

    python -m tests.service.soak [--json FILE] [--scale 1.0] [--only NAME ...] [--bundle FOLDER] [--hour]

Servers are processes of their own on this machine, with one engine thread. The model is a small one with real graphs
(tests/export/small.py) unless --bundle names another; latency is measured on the embedded model too, where it is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftvideo.runtime.pipeline import EMBEDDED
from swiftvideo.sdk.machine import describe
from tests.export.small import export_small

from . import faults, load, scenarios
from .harness import ServerProcess, embedded

FREE = ("--max-load", "0")
EMBEDDED_PROMPTS = ("a red circle moving right", "a blue square moving up")
NAMES = (
    "cancels",
    "stalled",
    "overload",
    "switches",
    "cuts",
    "kills",
    "sigterm",
    "fuzz",
    "churn",
    "planted_leak",
    "latency",
)


class Soak:
    """Scenarios on two bundles: `small` for counts, `wide`, with larger chunks, for memory."""

    def __init__(self, small: Path, wide: Path, scale: float, folder: Path) -> None:
        self.small, self.wide, self.scale, self.folder = small, wide, scale, folder

    def n(self, full: int) -> int:
        """A count at this scale."""
        return max(4, round(full * self.scale))

    def cancels(self) -> dict[str, Any]:
        """1: cancels at random moments."""
        with ServerProcess(self.small, *FREE) as server:
            found = asyncio.run(scenarios.cancels(server, self.n(1000)))
        still = found["growth"]
        found["ok"] = (
            found["after_cancel"] <= 1
            and not found["sessions"]
            and not found["caches"]
            and max(still["tasks"], still["threads"], still["descriptors"]) <= 0
        )
        return found

    def stalled(self) -> dict[str, Any]:
        """2: a client that stops reading: memory where chunks are large, gaps where there are many."""
        text = EMBEDDED_PROMPTS[0] if self.wide == EMBEDDED else "w1 w2"
        with ServerProcess(self.wide, *FREE) as server:
            memory = asyncio.run(load.stalled(server, self.n(40), text=text))
        with ServerProcess(self.small, *FREE) as server:
            gaps = asyncio.run(load.stalled(server, self.n(400), rounds=11))
        ok = (
            memory["rss_growth"] <= memory["credits_bytes"] + faults.MEBIBYTE
            and not memory["credits_left"]
            and not gaps["credits_left"]
            and gaps["p99_change"] < 0.05
        )
        return {"memory": memory, "gaps": gaps, "ok": ok}

    def overload(self) -> dict[str, Any]:
        """3: four times the capacity."""
        with ServerProcess(self.small, *FREE, "--max-sessions", "4") as server:
            found = asyncio.run(load.overload(server, 4, self.n(300), rounds=11))
        found["ok"] = (
            found["codes"] == ["RESOURCE_EXHAUSTED"]
            and found["hints"] == found["rejects"]["count"]
            and found["slowest_reject_ms"] <= 50
            and found["rate_kept"] >= 0.95
        )
        return found

    def switches(self) -> dict[str, Any]:
        """4: prompt switches."""
        with ServerProcess(self.small, *FREE) as server:
            found = asyncio.run(scenarios.switches(server, self.n(10_000)))
        found["ok"] = not found["problems"]
        return found

    def cuts(self) -> dict[str, Any]:
        """5a: connection cuts."""
        with ServerProcess(self.small, *FREE) as server, embedded(self.small) as pipeline:
            found = asyncio.run(scenarios.cuts(server, pipeline, self.n(500)))
        found["ok"] = not found["sessions_that_differ"]
        return found

    def kills(self) -> dict[str, Any]:
        """5b: kill -9."""
        with embedded(self.small) as pipeline:
            rounds = max(1, round(10 * self.scale))
            found = asyncio.run(faults.kills(self.small, self.folder / "snapshots", pipeline, rounds))
        found["ok"] = (
            not found["sessions_that_differ"] and max(found["chunks_made_again"]) <= found["most_made_again"]
        )
        return found

    def sigterm(self) -> dict[str, Any]:
        """6: SIGTERM."""
        with ServerProcess(self.small, *FREE, "--grace", "2") as server:
            found = asyncio.run(scenarios.sigterm(server, 6, 2.0))
        found["ok"] = (
            found["not_serving"]
            and found["not_serving_after_ms"] < 100
            and not found["broken_chunks"]
            and found["exit_seconds"] <= 3
            and found["exit_code"] == 0
        )
        return found

    def fuzz(self) -> dict[str, Any]:
        """7: hostile messages."""
        with ServerProcess(self.small, *FREE, "--max-sessions", "64") as server:
            found = asyncio.run(faults.fuzz(server, self.n(100_000), self.n(10_000)))
        found["ok"] = (
            not found["not_allowed"] and found["alive"] and not found["sessions"] and not found["caches"]
        )
        return found

    def churn(self, seconds: float | None = None) -> dict[str, Any]:
        """8: sessions come and go."""
        with ServerProcess(self.small, *FREE) as server:
            found = asyncio.run(faults.churn(server, seconds or max(10.0, 300 * self.scale)))
        found["leaks"] = faults.leaks(found)
        found["ok"] = not found["leaks"]
        return found

    def planted_leak(self) -> dict[str, Any]:
        """8: the same with a leak in the server, which must be seen."""
        with ServerProcess(self.small, *FREE, module="tests.service.leaky_server") as server:
            found = asyncio.run(faults.churn(server, max(10.0, 30 * self.scale), samples=8))
        found["leaks"] = faults.leaks(found)
        found["ok"] = bool(found["leaks"])
        return found

    def latency(self) -> dict[str, Any]:
        """10: what the service adds, on the embedded model where it is there."""
        has = (EMBEDDED / "manifest.json").is_file()
        bundle = EMBEDDED if has else self.small
        texts = EMBEDDED_PROMPTS if has else ("w1 w2", "w5 w6")
        with ServerProcess(bundle, *FREE) as server, embedded(bundle) as pipeline:
            found = asyncio.run(load.latency(server, pipeline, self.n(40), *texts))
        return {"model": "embedded" if has else "small", **found, "ok": True}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="1.0: the counts of docs/service.md")
    parser.add_argument("--only", nargs="*", help="names of scenarios")
    parser.add_argument("--bundle", type=Path, help="a bundle of the small model, made before")
    parser.add_argument("--wide", type=Path, help="a bundle with larger chunks")
    parser.add_argument("--hour", action="store_true", help="churn for an hour")
    options = parser.parse_args()
    result: dict[str, Any] = {**describe(), "scale": options.scale}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        small = options.bundle or export_small(folder / "small")
        has = (EMBEDDED / "manifest.json").is_file()
        wide = options.wide or (EMBEDDED if has else export_small(folder / "wide", 24, 32))
        soak = Soak(small, wide, options.scale, folder)
        for name in NAMES:
            if options.only and name not in options.only:
                continue
            work: Callable[..., dict[str, Any]] = getattr(soak, name)
            begin = time.monotonic()
            result[name] = work(3600.0) if name == "churn" and options.hour else work()
            result[name]["took_seconds"] = round(time.monotonic() - begin, 1)
            print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if all(item.get("ok", True) for item in result.values() if isinstance(item, dict)) else 1


if __name__ == "__main__":
    sys.exit(main())
