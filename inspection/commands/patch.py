"""`attend.py patch RUN`: activation patching between two texts, as tables, a figure and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import escape_control_chars
from inspection.commands.shared import Context, DeviceOptions, OutputOptions, Result
from inspection.plots import draw_patching
from inspection.terminal import head_name, paragraph, quote_token, table

if TYPE_CHECKING:
    from inspection.patching import PatchingResult

EXPLANATION = (
    "1: the patch brings the whole logit difference back, 0: nothing. control: the same patch from the clean text's "
    "tokens in a random order (mean over 4 orders)."
)


@dataclass(frozen=True)
class Patch(OutputOptions, DeviceOptions):
    """Put activations of a clean text into a corrupt one, and see where the right answer comes back."""

    clean: str = ""  # A text that the right answer continues.
    corrupt: str = ""  # A text of as many tokens that the wrong answer continues.
    right: str = ""  # The right answer, such as " Ann", with its space.
    wrong: str = ""  # The wrong answer.
    checkpoint: str = "best"  # The checkpoint of a run: `best` (lowest validation loss), `last`, or a step.
    out: str = ""  # The figure to write; by default figures/patch.png in the run folder.

    def problems(self) -> list[str]:
        """One line for each option that is missing."""
        missing = [name for name in ("clean", "corrupt", "right", "wrong") if not getattr(self, name)]
        return super().problems() + [f"--{name} is missing; give a text in quotes" for name in missing]

    def result(self, context: Context) -> Result:
        """Patch by layer and position, and by head."""
        from inspection.patching import patch_texts

        path = Path(self.run)
        loaded = context.load_model(path, self.checkpoint)
        patching = patch_texts(loaded.model, loaded.encode, self.clean, self.corrupt, self.right, self.wrong)
        folder = path.parent.parent if (path / "manifest.json").is_file() else path
        figure = Path(self.out) if self.out else folder / "figures" / "patch.png"
        draw_patching(figure, patching, loaded.token_bytes, f"step {loaded.step}: {self.right!r} or {self.wrong!r}")
        lines = [
            f"{folder}, step {loaded.step}",
            f"logit difference of {self.right!r} and {self.wrong!r}: "
            f"{patching.clean:+.2f} nats on the clean text, {patching.corrupt:+.2f} on the corrupt one",
            *patching_tables(patching, loaded.token_bytes, context.width),
            "",
            *paragraph(EXPLANATION, context.width),
            f"figure  {figure}",
        ]
        data: dict[str, Any] = {"run": str(folder), "step": loaded.step, "figure": str(figure), **patching.to_dict()}
        return Result([escape_control_chars(line) for line in lines], data)


def patching_tables(patching: PatchingResult, token_bytes: Callable[[int], bytes], width: int) -> list[str]:
    """A row for each position, and one for each head, each share with its control."""
    L, T = patching.residual.shape
    titles = ["position", "clean", "corrupt", *(title for layer in range(L) for title in (f"L{layer}", "control"))]
    rows: list[list[Any]] = []
    for t in range(T):
        words = [quote_token(token_bytes(tokens[t])) for tokens in (patching.clean_tokens, patching.corrupt_tokens)]
        pairs = zip(patching.residual[:, t], patching.residual_control[:, t], strict=True)
        rows.append([t, *words, *(float(share) for pair in pairs for share in pair)])
    pairs = zip(patching.heads.flat, patching.heads_control.flat, strict=True)
    names = [head_name(*divmod(k, patching.heads.shape[1])) for k in range(patching.heads.size)]
    heads: list[list[Any]] = [
        [name, float(share), float(control)] for name, (share, control) in zip(names, pairs, strict=True)
    ]
    lines = ["", "residual stream before each layer, at one position", *table(titles, rows, width, fixed=3)]
    return [*lines, "", "output of a head, at all positions", *table(["head", "patched", "control"], heads, width)]
