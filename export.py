"""Export a trained model:  python export.py RUN OUT [--format gguf] [--option value ...]

OUT becomes a Hugging Face folder, which transformers loads, or with `--format gguf` a file for llama.cpp. RUN is a run folder, a
checkpoint folder or a Hugging Face folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

if sys.flags.safe_path:  # python -P, python -I
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.errors import CONFIG, DISK_OR_MEMORY, UserError, escape_control_chars, run_main
from common.files import retry_if_removed
from training.cli import parse


@dataclass(frozen=True)
class ExportConfig:
    """Export settings."""

    run: Positional[str]  # Run folder, checkpoint folder or Hugging Face folder.
    out: Positional[str] = ""  # The folder to write, or the file with --format gguf; it must not exist yet.
    checkpoint: str = "best"  # The checkpoint of a run: `best` (lowest validation loss), `last`, or a step.
    format: Literal["huggingface", "gguf"] = "huggingface"
    """`huggingface`: for transformers; `gguf`: for llama.cpp (presets gpt2 and qwen3)."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # Dtype of the matrices.

    def problems(self) -> list[str]:
        if not self.out:
            return ["out is missing: python export.py RUN OUT"]
        return [f"{self.out} exists already; name a new one"] if os.path.lexists(self.out) else []


@retry_if_removed
def main(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, "Export a trained model.", positional=["run", "out"])
    from training.export import write_gguf, write_huggingface
    from training.pretrained import open_model

    checkpoint = open_model(config.run, config.checkpoint)
    out = Path(config.out)
    write = write_gguf if config.format == "gguf" else write_huggingface
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
            partial = Path(name) / "export"
            lines = write(checkpoint, partial, config.dtype)
            if os.path.lexists(out):
                raise UserError(f"{out} exists already; name a new one", CONFIG)
            shutil.move(partial, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}", DISK_OR_MEMORY) from error
    for line in lines:
        print(line.replace("OUT", escape_control_chars(config.out)))


if __name__ == "__main__":
    run_main(main)
