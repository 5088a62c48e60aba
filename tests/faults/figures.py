"""What the fault suite tried, and what came of it: counted in each test, added up in the last lines of the output.

The counts travel in the tests' reports, so that several workers may share the work. pytest reads the conftest of this
folder only where it looks into it; so the summary stands here, for any conftest to take up (it is printed once).
"""

from __future__ import annotations

import pytest

KEY = "faults"
PRINTED = pytest.StashKey[bool]()


class Figures:
    """What a test tried, and what came of it."""

    def __init__(self) -> None:
        self.counts = {"tried": 0, "survived": 0, "steps_lost": 0, "resumed": 0, "equal": 0, "pickles": 0}

    def add(self, **counts: int) -> None:
        """Count `tried` faults, those `survived`, committed `steps_lost`, runs `resumed` and how many of them ended
        with `equal` weights, and `pickles` that were executed."""
        for name, count in counts.items():
            self.counts[name] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines: the sums over all tests."""
    stash = terminalreporter.config.stash
    reports = [report for group in terminalreporter.stats.values() for report in group]
    counted = [counts for report in reports for key, counts in getattr(report, "user_properties", ()) if key == KEY]
    if not counted or stash.get(PRINTED, False):
        return
    stash[PRINTED] = True
    total = {name: sum(counts[name] for counts in counted) for name in counted[0]}
    terminalreporter.section("faults")
    terminalreporter.line(
        f"{total['tried']:,} tried, {total['survived']:,} survived, {total['steps_lost']} committed steps lost; "
        f"{total['resumed']:,} runs resumed, {total['equal']:,} of them ended with the same weights; "
        f"{total['pickles']} pickles executed"
    )
