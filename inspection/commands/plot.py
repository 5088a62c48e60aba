"""`attend.py plot RUN`: figures of a run, as PNG or SVG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inspection.commands.shared import Context, Result, RunOptions
from inspection.plots import draw_figures
from inspection.run_reader import NEWEST, RunFiles


@dataclass(frozen=True)
class Plot(RunOptions):
    """Draw all heads on a text, one head, the scores over the steps, and the loss next to them."""

    format: Literal["png", "svg"] = "png"
    """File format."""
    out: str = ""
    """Folder for the figures; by default figures/ in the run folder."""
    text: str = ""
    """Name of the text; by default the model's sample, and for one head a text on which its score is measured."""
    score: str = ""
    """Score of the timeline, or `all`; by default the most informative one."""
    step: int = NEWEST
    """The step whose patterns are drawn; -1 is the newest."""


def run(options: Plot, context: Context) -> Result:
    """Draw the figures for which the run has data."""
    files = RunFiles.open(options.run)
    folder = Path(options.out) if options.out else files.base_folder / "figures"
    paths = draw_figures(files, folder, options.format, files.step(options.step), options.text, options.score)
    lines = [f"figure  {path}" for path in paths]
    if not any(path.stem == "phase_change" for path in paths):
        lines.append("no phase_change: it needs losses, induction and previous_token scores at two steps or more")
    return Result(lines)
