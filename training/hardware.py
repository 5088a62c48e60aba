"""GPUs by name for `train.py --plan 8xh100`, and the parsing of that option, which needs no torch."""

import re
from typing import NamedTuple

from common.errors import UserError


class GPU(NamedTuple):
    """Peaks from the maker's data sheet, without sparsity."""

    name: str
    half: float  # FLOP/s of bf16 or fp16 products summed in fp32
    fp32: float  # FLOP/s outside the tensor cores
    memory: float  # bytes
    half_dtypes: tuple[str, ...] = ("bf16", "fp16")  # that it multiplies at the rate `half`, the best first


GPUS = {
    "a100": GPU("A100 80 GB", 312e12, 19.5e12, 80e9),
    "a100-40": GPU("A100 40 GB", 312e12, 19.5e12, 40e9),
    "a100-80": GPU("A100 80 GB", 312e12, 19.5e12, 80e9),
    "h100": GPU("H100 SXM", 989e12, 67e12, 80e9),
    "h200": GPU("H200", 989e12, 67e12, 141e9),
    "b200": GPU("B200", 2250e12, 75e12, 180e9),
    "l4": GPU("L4", 121e12, 30.3e12, 24e9),
    "t4": GPU("T4", 65e12, 8.1e12, 16e9, ("fp16",)),
    "v100": GPU("V100 16 GB", 125e12, 15.7e12, 16e9, ("fp16",)),
    "rtx3090": GPU("RTX 3090", 71e12, 35.6e12, 24e9),
    "rtx4090": GPU("RTX 4090", 165.2e12, 82.6e12, 24e9),
    "rtx5090": GPU("RTX 5090", 209.5e12, 104.8e12, 32e9),
}
"""From NVIDIA's data sheets (A100, H100, H200, L4, T4, V100, DGX B200) and white papers (GA102, AD102, GB202); SXM versions."""


def parse_plan_option(argv: list[str]) -> tuple[list[str], tuple[GPU | None, int] | None]:
    """The command line without `--plan`, and its target, a kind of GPU and their number; None without `--plan`.

    `--plan` alone means this machine; `--plan 8xh100` and `--plan=8xh100` name GPUs. Raises UserError for an unknown one (2).
    """
    for i, word in enumerate(argv):
        option, _, name = word.partition("=")
        if option == "--plan":
            rest = argv[i + 1 :]
            if not name and rest and not rest[0].startswith("-") and not rest[0].endswith(".toml"):
                name = rest.pop(0)
            return argv[:i] + rest, parse_target(name) if name else (None, 1)
    return argv, None


def parse_target(text: str) -> tuple[GPU, int]:
    count, name = re.fullmatch(r"(?:([1-9]\d{0,4})x)?(.*)", text.lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    if name not in GPUS:
        raise UserError(f"--plan does not know GPU {text!r}; known: {', '.join(GPUS)}; 8xh100 for eight")
    return GPUS[name], int(count or 1)
