"""`attend.py page RUN`, `plot RUN` and `ablate RUN`: write the page, the figures, or new ablation effects of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import CHECKPOINT, CONFIG, UserError
from inspection.commands.shared import Context, DeviceOptions, LoadedModel, Result, RunOptions, parse_heads
from inspection.plots import draw_figures
from inspection.run_reader import DEFAULT, FOLDER, RunFiles, find_attention_files
from inspection.terminal import head_name, interval, paragraph, table

if TYPE_CHECKING:
    from inspection.eval_texts import EvalTexts


@dataclass(frozen=True)
class Page(RunOptions):
    """Build the page that shows a run's attention; it opens in a browser, offline."""

    against: str = ""  # Another run to compare with.
    out: str = ""  # The file to write; by default attention.html in the run folder.
    megabytes: float = 8.0  # Size of the page: earlier steps are left out where it would be larger.

    def result(self, context: Context) -> Result:
        from inspection.page_builder import PageRun, write_page

        runs = [RunFiles.open(name) for name in (self.run, self.against) if name]
        first = runs[0]
        path = Path(self.out) if self.out else first.base_folder / "attention.html"
        pages = [PageRun(str(run.folder), *run.history(run.reported_step), run.folder) for run in runs]
        notes = write_page(path, pages, first.findings, first.ablation, str(first.folder), int(1e6 * self.megabytes))
        return Result([f"page  {path}  {path.stat().st_size / 1e6:.1f} MB", *notes])


@dataclass(frozen=True)
class Plot(RunOptions):
    """Draw all heads on a text, one head, a score over the steps, and the loss next to scores that formed."""

    format: Literal["png", "svg", "pdf"] = "png"  # File format.
    out: str = ""  # Folder for the figures; by default figures/ in the run folder.
    text: str = ""  # Name of the text; by default the model's sample, and for one head a text where it matters.
    score: str = ""  # Score of the timeline; by default that of the finding.
    step: int = DEFAULT  # The step whose patterns are drawn; by default the one whose heads were ablated.

    def result(self, context: Context) -> Result:
        run = RunFiles.open(self.run)
        folder = Path(self.out) if self.out else run.base_folder / "figures"
        paths = draw_figures(run, folder, self.format, run.step(self.step), self.text, self.score)
        return Result([f"figure  {path}" for path in paths])


@dataclass(frozen=True)
class Ablate(DeviceOptions):
    """Ablate each head of a checkpoint, as training does at its end, for a run that was stopped early or a Hugging Face folder;
    or some heads together."""

    heads: str = ""  # Heads to ablate together, such as L1H0,L1H3: prints the effects and writes nothing.
    checkpoint: str = "best"  # The checkpoint of the run: `best` (lowest validation loss), `last`, or a step.
    prompts: str = ""  # For a Hugging Face folder: a file of texts and contrast pairs, as for `train.py --log.prompts`.

    def result(self, context: Context) -> Result:
        from inspection.recorder import AttentionRecorder

        folder, loaded, texts = self.load(context)
        if self.heads:
            return self.together(loaded, texts, context.width)
        recorder = AttentionRecorder(texts, loaded.token_bytes, folder)
        run = RunFiles(folder, find_attention_files(folder / FOLDER))
        if loaded.step not in run.steps or run.read_intact(loaded.step) is None:
            recorder.write(loaded.model, loaded.step, dict(loaded.metadata))
        report, written = recorder.report(loaded.model, loaded.step, loaded.metadata["weights_sha256"])
        lines = [part for line in report for part in paragraph(line, context.width) or [""]]
        return Result([*lines, "", *(f"written  {path}" for path in written)])

    def load(self, context: Context) -> tuple[Path, LoadedModel, EvalTexts]:
        """The run folder, the model, and the texts on which its heads are ablated."""
        if (Path(self.run) / "config.json").is_file():
            from inspection.eval_texts import pretrained_texts

            loaded = context.load_model(Path(self.run), self.checkpoint)
            texts = pretrained_texts(loaded.tokenizer, loaded.model.config, self.prompts)
            if not self.heads:
                texts.save(Path(self.run) / FOLDER / "eval_texts.json")
            return Path(self.run), loaded, texts
        if self.prompts:
            problem = "--prompts is for a Hugging Face folder; a run keeps the texts of its --log.prompts"
            raise UserError(problem, CONFIG)
        run = RunFiles.open(self.run)
        if not run.folder.is_dir():
            problem = f"{run.folder} is an attention file; ablation needs a run folder with a checkpoint"
            raise UserError(problem, CHECKPOINT)
        is_checkpoint = (Path(self.run) / "manifest.json").is_file()
        loaded = context.load_model(Path(self.run) if is_checkpoint else run.folder, self.checkpoint)
        saved = run.eval_texts(loaded.model.vocab_size, loaded.model.config.context)
        if saved is None:
            raise UserError(f"{run.folder} has no attention/eval_texts.json to ablate on", CHECKPOINT)
        return run.folder, loaded, saved

    def together(self, loaded: LoadedModel, texts: EvalTexts, width: int) -> Result:
        """The effects of ablating `heads` at once, on each measure."""
        from inspection.ablation import CONTROLS, ablate_together

        config = loaded.model.config
        heads = parse_heads(self.heads.split(","), (config.n_layers, config.n_heads))
        rows: list[list[Any]] = []
        for name, effects in ablate_together(loaded.model, texts, heads).items():
            if name.startswith("corpus."):  # halves of the held-out texts, which only the findings need
                continue
            keys = ("zero", "control_zero", "mean", "control_mean")
            cells = [interval(effects.tables.get(key)) for key in keys]
            rows.append([name, effects.count, effects.unit, effects.baseline, *cells])
        titles = ["measure", "items", "unit", "whole", "zero ablation", "control", "mean ablation", "control"]
        about = (
            "effects with 95% intervals, positive where ablating hurts; control: as many random other heads of the same "
            f"layers (mean of {CONTROLS} draws), - where a layer has too few others"
        )
        title = f"step {loaded.step}: {', '.join(head_name(*head) for head in heads)} ablated together"
        return Result([title, "", *table(titles, rows, max(width, 160)), "", *paragraph(about, width)])
