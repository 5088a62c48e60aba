"""`attend.py patch RUN`: activation patching between two texts, as tables, a figure and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inspection.commands.shared import Context, DeviceOptions, OutputOptions, Result
from inspection.plots import draw_patching
from inspection.terminal import number, paragraph, quote_token, table

if TYPE_CHECKING:
    from inspection.patching import PatchingResult

EXPLANATION = (
    "1: the patch brings the whole logit difference back, 0: nothing. In brackets the control: the same patch from texts "
    "with random tokens wherever the clean and the corrupt text differ."
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
        tables = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(patching).items()}
        return Result(lines, {"run": str(folder), "step": loaded.step, "figure": str(figure), **tables})


def patching_tables(patching: PatchingResult, token_bytes: Callable[[int], bytes], width: int) -> list[str]:
    """A row for each position with a column for each layer, and a row for each layer with a column for each head."""

    def cells(shares: NDArray[np.float64], controls: NDArray[np.float64]) -> list[str]:
        return [f"{number(share)} ({number(control)})" for share, control in zip(shares, controls, strict=True)]

    clean, corrupt = (map(quote_token, map(token_bytes, t)) for t in (patching.clean_tokens, patching.corrupt_tokens))
    columns = zip(patching.residual.T, patching.residual_control.T, strict=True)
    positions: list[list[Any]] = [
        [t, *words, *cells(*pair)] for t, (*words, pair) in enumerate(zip(clean, corrupt, columns, strict=True))
    ]
    layers = [f"L{layer}" for layer in range(len(patching.heads))]
    rows = zip(layers, patching.heads, patching.heads_control, strict=True)
    heads = [[layer, *cells(shares, controls)] for layer, shares, controls in rows]
    names = [f"H{head}" for head in range(patching.heads.shape[1])]
    lines = ["", "residual stream before each layer, at one position"]
    lines += [*table(["position", "clean", "corrupt", *layers], positions, width, fixed=3), ""]
    return [*lines, "output of each head, at all positions", *table(["", *names], heads, width)]
