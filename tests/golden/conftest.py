"""Says at the end how far each engine was from the recorded latents."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

PROPERTY = "golden_latents"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per engine with the largest error of all scenarios."""
    errors: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == PROPERTY:
                errors[value[0]].append((value[2], value[1]))
    for engine, found in errors.items():
        error, scenario = max(found)
        terminalreporter.write_line(
            f"recorded latents, {engine}: largest error {error:.2g}, in {scenario} of {len(found)} scenarios"
        )
