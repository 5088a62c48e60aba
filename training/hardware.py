"""GPUs by name, for planning a run on a machine that is not this one; and how the command line names them.

`train.py --plan 8xh100` comes here first: a mistyped name is answered before torch is loaded.
"""

from __future__ import annotations

import difflib
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, escape_control_chars

PLAN = "--plan"
MOST = 65_536
"""GPUs that may be asked for."""


@dataclass(frozen=True)
class GPU:
    """What the maker's data sheet says of a GPU: peaks that are never reached, without sparsity."""

    name: str
    bf16: float
    """Operations a second in bf16 products summed in fp32; 0 where the hardware has no bf16."""
    fp32: float
    """Operations a second in fp32 outside the tensor cores."""
    memory: float
    """Bytes; a GB is taken as 10⁹."""
    bandwidth: float
    """Bytes a second from and to that memory."""


GPUS = {
    "a100-40": GPU("A100 40 GB", 312e12, 19.5e12, 40e9, 1555e9),
    "a100-80": GPU("A100 80 GB", 312e12, 19.5e12, 80e9, 2039e9),
    "h100": GPU("H100 SXM", 989e12, 67e12, 80e9, 3350e9),
    "h200": GPU("H200", 989e12, 67e12, 141e9, 4800e9),
    "b200": GPU("B200", 2250e12, 75e12, 180e9, 8000e9),
    "l4": GPU("L4", 121e12, 30.3e12, 24e9, 300e9),
    "t4": GPU("T4", 0.0, 8.1e12, 16e9, 320e9),
    "rtx3090": GPU("RTX 3090", 71e12, 35.6e12, 24e9, 936e9),
    "rtx4090": GPU("RTX 4090", 165.2e12, 82.6e12, 24e9, 1008e9),
    "rtx5090": GPU("RTX 5090", 209.5e12, 104.8e12, 32e9, 1792e9),
}
"""From NVIDIA's data sheets (A100, H100, H200, L4, T4), the DGX B200 one, and the white papers of GA102, AD102 and
GB202 for the RTX cards; SXM versions where there are several."""


@dataclass(frozen=True)
class PlanTarget:
    """Where a run is planned: so many GPUs of a kind, or this machine where `gpu` is None."""

    gpu: GPU | None = None
    count: int = 1


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def parse_plan_option(argv: list[str]) -> tuple[list[str], PlanTarget | None]:
    """The command line without `--plan`, and the place it names; None where nothing is to be planned.

    `--plan` alone means this machine; `--plan 8xh100` and `--plan=8xh100` name another. A config file may follow.

    Raises:
        UserError: for a name that is not in the table (exit code 2).
    """
    for i, word in enumerate(argv):
        if word == PLAN:
            named = argv[i + 1 : i + 2]
            if not named or named[0].startswith("-") or named[0].endswith(".toml"):
                named = []
            return argv[:i] + argv[i + 1 + len(named) :], parse_target(*named)
        if word.startswith(f"{PLAN}="):
            return argv[:i] + argv[i + 1 :], parse_target(word.split("=", 1)[1])
    return argv, None


def parse_target(text: str = "") -> PlanTarget:
    """`8xh100` as eight of them; no text is this machine.

    Raises:
        UserError: if there is no such GPU, with the nearest name (exit code 2).
    """
    if not text:
        return PlanTarget()
    match = re.fullmatch(r"(?:(\d{1,6})[x*])?(.+)", text.lower().strip(), re.S)
    count, name = (int(match[1] or 1), re.sub(r"[\s_]", "", match[2])) if match else (1, text)
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5) or [key for key in GPUS if name and name in key]
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--plan knows no GPU {escape_control_chars(text)!r}; {hint}it knows {', '.join(GPUS)}, and 8xh100 for eight"
        )
    if not 1 <= count <= MOST:
        raise UserError(f"--plan {escape_control_chars(text)}: the number of GPUs must lie between 1 and {MOST:,}")
    return PlanTarget(GPUS[name], count)
