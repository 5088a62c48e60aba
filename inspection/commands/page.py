"""`attend.py page RUN`: (re)build the page of a run, alone or beside another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import escape_control_chars
from inspection.commands.shared import OfRun
from inspection.run_reader import RunFiles
from inspection.terminal import Result, Terminal


@dataclass(frozen=True)
class Page(OfRun):
    """The page that shows a run's attention; it opens in a browser, from disk."""

    against: str = ""
    """Another run to compare with."""
    out: str = ""
    """The file to write; by default attention.html in the run folder."""


def run(config: Page, terminal: Terminal) -> Result:
    """Build the page and say what it holds."""
    from inspection.page_builder import PageRun, write_page

    attentions = [RunFiles.open(name) for name in (config.run, config.against) if name]
    first = attentions[0]
    beside = first.folder if first.folder.is_dir() else first.folder.parent
    path = Path(config.out) if config.out else beside / "attention.html"
    report = write_page(
        path,
        [PageRun(str(each.folder), list(each.attention_files.values())) for each in attentions],
        first.findings,
        first.ablation,
        str(first.folder),
    )
    lines = [
        f"page  {escape_control_chars(report.path)}  {report.bytes / 1e6:.1f} MB",
        *map(escape_control_chars, report.notes),
    ]
    data = {"path": str(report.path), "bytes": report.bytes, "notes": list(report.notes)}
    return Result(lines, data, [data])
