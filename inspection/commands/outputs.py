"""`attend.py page RUN`, `plot RUN` and `ablate RUN`: write the page, the figures, or new ablation effects of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import CHECKPOINT, UserError
from inspection.commands.shared import Context, DeviceOptions, Result, RunOptions
from inspection.plots import draw_figures
from inspection.run_reader import DEFAULT, RunFiles
from inspection.terminal import paragraph


@dataclass(frozen=True)
class Page(RunOptions):
    """Build the page that shows a run's attention; it opens in a browser, offline."""

    against: str = ""
    """Another run to compare with."""
    out: str = ""
    """The file to write; by default attention.html in the run folder."""

    def result(self, context: Context) -> Result:
        """Build the page and list what it holds."""
        from inspection.page_builder import PageRun, write_page

        runs = [RunFiles.open(name) for name in (self.run, self.against) if name]
        first = runs[0]
        path = Path(self.out) if self.out else first.base_folder / "attention.html"
        pages = [PageRun(str(run.folder), *run.history(run.reported_step)) for run in runs]
        notes = write_page(path, pages, first.findings, first.ablation, str(first.folder))
        return Result([f"page  {path}  {path.stat().st_size / 1e6:.1f} MB", *notes])


@dataclass(frozen=True)
class Plot(RunOptions):
    """Draw all heads on a text, one head, a score over the steps, and the loss next to scores that formed."""

    format: Literal["png", "svg", "pdf"] = "png"
    """File format."""
    out: str = ""
    """Folder for the figures; by default figures/ in the run folder."""
    text: str = ""
    """Name of the text; by default the model's sample, and for one head a text where it matters."""
    score: str = ""
    """Score of the timeline; by default that of the finding."""
    step: int = DEFAULT
    """The step whose patterns are drawn; by default the one whose heads were ablated."""

    def result(self, context: Context) -> Result:
        """Draw the figures for which the run has data."""
        run = RunFiles.open(self.run)
        folder = Path(self.out) if self.out else run.base_folder / "figures"
        paths = draw_figures(run, folder, self.format, run.step(self.step), self.text, self.score)
        return Result([f"figure  {path}" for path in paths])


@dataclass(frozen=True)
class Ablate(DeviceOptions):
    """Ablate each head of a checkpoint, as training does at its end; for a run that was stopped early."""

    checkpoint: str = "best"
    """The checkpoint of the run: `best` (lowest validation loss), `last`, or a step."""

    def result(self, context: Context) -> Result:
        """Rewrite ablations, findings, figures and page; a step without an attention file gets one."""
        from inspection.recorder import AttentionRecorder

        run = RunFiles.open(self.run)
        folder = run.folder
        if not folder.is_dir():
            raise UserError(f"{folder} is an attention file; ablation needs a run folder with a checkpoint", CHECKPOINT)
        is_checkpoint = (Path(self.run) / "manifest.json").is_file()
        loaded = context.load_model(Path(self.run) if is_checkpoint else folder, self.checkpoint)
        texts = run.eval_texts(loaded.model.vocab_size, loaded.model.config.context)
        if texts is None:
            raise UserError(f"{folder} has no attention/eval_texts.json to ablate on", CHECKPOINT)
        recorder = AttentionRecorder(texts, loaded.token_bytes, folder)
        if loaded.step not in run.steps or run.read_intact(loaded.step) is None:
            recorder.write(loaded.model, loaded.step, dict(loaded.metadata))
        report, written = recorder.report(loaded.model, loaded.step, loaded.metadata["weights_sha256"])
        lines = [part for line in report for part in paragraph(line, context.width) or [""]]
        return Result([*lines, "", *(f"written  {path}" for path in written)])
