"""`attend.py page RUN`: build the page of a run, alone or next to another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inspection.commands.shared import Context, Result, RunOptions
from inspection.run_reader import RunFiles


@dataclass(frozen=True)
class Page(RunOptions):
    """Build the page that shows a run's attention; it opens in a browser, offline."""

    against: str = ""
    """Another run to compare with."""
    out: str = ""
    """The file to write; by default attention.html in the run folder."""


def run(options: Page, context: Context) -> Result:
    """Build the page and list what it holds."""
    from inspection.page_builder import PageRun, write_page

    runs = [RunFiles.open(name) for name in (options.run, options.against) if name]
    first = runs[0]
    path = Path(options.out) if options.out else first.base_folder / "attention.html"
    pages = [PageRun(str(each.folder), [each.read(step) for step in each.steps], each.evaluations()) for each in runs]
    notes = write_page(path, pages, first.findings, first.ablation, str(first.folder))
    return Result([f"page  {path}  {path.stat().st_size / 1e6:.1f} MB", *notes])
