"""The training callback that records attention, and the report on heads at the end of a run.

At each evaluation `AttentionRecorder` computes the head scores, which go into metrics.jsonl, and writes an attention file
if the step is one of those to keep. Its `report` ablates every head, decides which findings are supported, and writes
figures and the page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from common.errors import UserError, warn
from common.figures import report_failure
from common.files import remove_temporary_files
from inspection.ablation import loss_increases, run_ablations
from inspection.ablation_results import AblationResults
from inspection.activation_cache import run_with_cache_batch
from inspection.antecedent_score import AntecedentScore, antecedent_scores
from inspection.attention_file import AttentionFile, AttentionRecord, read_attention_file, write_attention_file
from inspection.compute_scores import compute_head_scores, uniform_scores
from inspection.eval_texts import OWN, EvalTexts
from inspection.findings import compute_findings, describe_largest, headline, save_findings, text_finding
from inspection.head_scores import ANTECEDENT
from inspection.page_builder import MODEL_SHARE, PAGE_BYTES, PageRun, write_page
from inspection.page_model import FOLDER, write_weights
from inspection.plots import draw_figures
from inspection.run_reader import RunFiles, find_attention_files
from inspection.terminal import DISCLAIMER, token_text
from model.gpt import GPT

KEPT_BETWEEN = 32  # attention files between the first and the last one, at most
SNAPSHOTS = 7  # of the weights before the last step, at most
EXAMPLES, EXAMPLE_CHARACTERS = 3, 60
Example = dict[str, Any]
"""A token of a held-out text: `text` (its name), `position`, and `loss_increase` by ablating a head, in nats."""


def kept_steps(steps: int, eval_every: int) -> list[int]:
    """The steps of a run of `steps` whose evaluations write an attention file: the first, the last, and at most `KEPT_BETWEEN`
    evenly spaced ones in between. They depend on the plan alone, so that a resumed run keeps the same ones."""
    between = range(eval_every, steps, eval_every)
    if len(between) > KEPT_BETWEEN:
        return [0, *(between[k * (len(between) - 1) // (KEPT_BETWEEN - 1)] for k in range(KEPT_BETWEEN)), steps]
    return [0, *between, steps]


def snapshot_steps(steps: int, eval_every: int) -> list[int]:
    """The steps before the last whose weights are kept for the page: 0, and of `kept_steps` those nearest to halves, quarters,
    ... of the run."""
    kept = kept_steps(steps, eval_every)[:-1]
    return [0, *(min(kept, key=lambda step: abs(step - steps / 2**k)) for k in range(1, SNAPSHOTS))]


def capture_texts(
    model: GPT, texts: Sequence[tuple[str, Sequence[int]]], token_bytes: Callable[[int], bytes], details: bool = False
) -> list[AttentionRecord]:
    """The attention records of texts (name, tokens), captured in one forward pass; see `run_with_cache_batch`."""
    if not texts:
        return []
    caches = run_with_cache_batch(model, [tokens for _, tokens in texts], details=details)
    return [AttentionRecord.from_cache(name, c, token_bytes) for (name, _), c in zip(texts, caches, strict=True)]


@dataclass
class AttentionRecorder:
    """A training callback that records the attention of fixed texts; reports on the heads at the end.

    Of the trainer it uses `model`, `state.step`, `sample_tokens`, `provenance()`, `config.train.steps` and `.eval_every`.
    """

    eval_texts: EvalTexts  # saved in the run folder, and loaded from there by a resumed run
    token_bytes: Callable[[int], bytes]  # of a token id
    run_dir: Path
    print_line: Callable[[str], object] = print  # prints the report

    @property
    def folder(self) -> Path:
        return self.run_dir / "attention"

    def path(self, step: int) -> Path:
        """The attention file of a step."""
        return self.folder / f"{step:06d}.safetensors"

    def on_start(self, trainer: Any) -> None:
        """Record the untrained model; or continue a run, without what it wrote after the step from which it continues."""
        step, path = trainer.state.step, self.folder / "eval_texts.json"
        for folder in (self.run_dir, self.folder, self.folder / FOLDER):
            remove_temporary_files(folder)
        for name in ("ablations.json", "findings.json"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.folder, self.folder / FOLDER):
            for file_step, file in find_attention_files(folder).items():
                if file_step > step:
                    file.unlink()
        if step and path.is_file():
            try:
                self.eval_texts = EvalTexts.load(path, trainer.model.vocab_size, trainer.model.config.context)
            except UserError as error:
                warn(f"{error}; it is written again")
        self.eval_texts.save(path)
        if step == 0:
            self.write(trainer.model, 0, trainer.provenance())
            self.write_weights(trainer.model, 0, 8)

    def on_eval(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """Add the head scores to the metrics, and write an attention file if the step is one of those to keep."""
        step, plan = trainer.state.step, trainer.config.train
        scores = compute_head_scores(trainer.model, self.eval_texts, self.token_bytes)
        metrics["head_scores"] = {
            name: [[float(str(value)) for value in row] for row in table.numpy()]  # the shortest decimals of a float32
            for name, table in scores.items()
        }
        if step >= plan.steps or step in kept_steps(plan.steps, plan.eval_every):
            self.write(trainer.model, step, trainer.provenance(), scores, trainer.sample_tokens or [])
        if step in snapshot_steps(plan.steps, plan.eval_every):
            self.write_weights(trainer.model, step, 8)

    def on_end(self, trainer: Any) -> None:
        """Ablate the heads, and write findings, figures and the page."""
        step, metadata = trainer.state.step, trainer.provenance()
        try:
            read_attention_file(self.path(step))
        except UserError:  # the run ended before its planned last step, or the file of its best step is damaged
            self.write(trainer.model, step, metadata, sample=trainer.sample_tokens or [])
        lines, _ = self.report(trainer.model, step, metadata["weights_sha256"])
        self.print_line("\n" + "\n".join(lines))

    def write(
        self,
        model: GPT,
        step: int,
        metadata: dict[str, str],
        scores: Mapping[str, ArrayLike] | None = None,
        sample: Sequence[int] = (),
    ) -> None:
        """Write the attention file of a step; head scores are computed if they are not given. `sample` are tokens that the model
        wrote, recorded with all details."""
        samples = [("sample", sample[-model.config.context :])] if sample else []
        records = capture_texts(model, samples, self.token_bytes, details=True)
        records += capture_texts(model, self.eval_texts.recorded_texts(), self.token_bytes)
        scores = scores or compute_head_scores(model, self.eval_texts, self.token_bytes)
        write_attention_file(self.path(step), records, metadata, scores)

    def write_weights(self, model: GPT, step: int, bits: int) -> None:
        """Write the weights of a step for the page, unless they are too many for it."""
        texts = self.eval_texts.scored_texts() or self.eval_texts.repeats
        if texts and sum(parameter.numel() for parameter in model.parameters()) * bits / 8 <= MODEL_SHARE * PAGE_BYTES:
            write_weights(self.folder / FOLDER / f"{step:06d}.safetensors", model, texts, bits)

    def report(self, model: GPT, step: int, weights_sha256: str) -> tuple[list[str], list[Path]]:
        """Ablate every head and write `ablations.json`, `findings.json`, figures and the page into the run folder.

        The attention file of `step` must exist; the texts of the examples are added to it. Returns the lines to print
        and the paths of the figures and the page.

        Raises UserError: a file is damaged (exit code 4) or cannot be written (6), or a prediction is not finite (5).
        """
        ablations = run_ablations(model, self.eval_texts, step, weights_sha256)
        ablations.save(self.folder / "ablations.json")
        antecedents = antecedent_scores(model, self.eval_texts.contrast_pairs)
        run = RunFiles.open(self.run_dir)
        files, evaluations = run.history(step)
        last = files[-1]
        timeline = {line["step"]: line["head_scores"] for line in evaluations} | {step: last.scores}
        chosen = {ANTECEDENT + s.kind: (s.head, s.attention, s.baseline) for s in antecedents if s.head}
        findings = compute_findings(timeline, ablations, chosen)
        uniform, examples = uniform_scores(self.eval_texts, self.token_bytes), list[Example]()
        is_own_text = set(self.eval_texts.pairs_by_kind()) <= {OWN}
        best = text_finding(timeline, ablations, uniform) if is_own_text else None
        if best and best.is_supported:
            examples = self.find_examples(model, best.head)
            names = {example["text"] for example in examples} - {text.name for text in last.texts}
            added = [(name, tokens) for name, tokens in self.eval_texts.held_out() if name in names]
            last.texts.extend(capture_texts(model, added, self.token_bytes))
            write_attention_file(self.path(step), last.texts, last.metadata, last.scores)
        findings = [best, *findings] if best else findings
        lines = [headline(findings), *map(self.describe, examples)]
        if best:
            lines += [line for finding in findings[1:] if finding.is_supported for line in ("", finding.summary)]
        named = {score: {"head": head, "value": value} for score, (head, value, _) in chosen.items()}
        save_findings(self.folder / "findings.json", findings, uniform=uniform, examples=examples, antecedents=named)
        if not last.texts:  # a context of one token, and no sample
            return [*lines, DISCLAIMER], []
        lines += describe_pairs(antecedents, ablations, last)
        figures = draw_figures(run, self.run_dir, "png", step, guard=report_failure)
        page = self.run_dir / "attention.html"
        self.write_weights(model, step, 16)
        page_run = PageRun(self.run_dir.name, files, evaluations, self.run_dir)
        write_page(page, [page_run], run.findings, ablations, page_run.label)
        return [*lines, DISCLAIMER], [*figures, page]

    def find_examples(self, model: GPT, head: tuple[int, int]) -> list[Example]:
        """The `EXAMPLES` tokens, each of another held-out text, whose loss rises most when the head is ablated."""
        texts = self.eval_texts.held_out()
        rises = loss_increases(model, [tokens for _, tokens in texts], *head)
        best = [(float(rise.max()), int(rise.argmax()) + 1, name) for (name, _), rise in zip(texts, rises, strict=True)]
        best = sorted(best, reverse=True)[:EXAMPLES]
        return [{"text": name, "position": position, "loss_increase": rise} for rise, position, name in best]

    def describe(self, example: Example) -> str:
        """An example as `  the text before it[ token]  +1.23 nats (held-out 5)`, with control characters escaped."""
        tokens = dict(self.eval_texts.texts)[example["text"]][: example["position"] + 1]
        *before, token = map(self.token_bytes, tokens)
        text = token_text(b"".join(before), " ")[-EXAMPLE_CHARACTERS:] if any(before) else ""
        return f"  {text}[{token_text(token, ' ')}]  +{example['loss_increase']:.2f} nats ({example['text']})"


def describe_pairs(scores: Sequence[AntecedentScore], ablations: AblationResults, file: AttentionFile) -> list[str]:
    """A line for each kind of contrast pair, below a title."""
    lines = ["", "contrast pairs"] if scores else []
    for score in scores:
        effects = ablations.measures.get(f"logit_diff.{score.kind}")  # None for a single pair
        largest = describe_largest(effects, score.head, file.scores.get(ANTECEDENT + score.kind)) if effects else ""
        lines.append(f"  {score.summary}" + (f"; {largest}" if largest else ""))
    return lines
