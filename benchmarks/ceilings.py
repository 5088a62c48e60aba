"""What this machine can do at most, measured: matrix products, and reading memory.

A benchmark's figures stand as shares of these. They are the best of many calls, for a limit is what is reached when
nothing disturbs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def best_seconds(work: Callable[[], object], seconds: float = 0.5, least: int = 5) -> float:
    """The quickest of as many calls as fit into so many seconds, at least a few; the first is not counted."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    wait()
    took: list[float] = []
    while sum(took) < seconds or len(took) < least:
        start = time.perf_counter()
        work()
        wait()
        took.append(time.perf_counter() - start)
    return min(took)


def product_speed(m: int, k: int, n: int, dtype: torch.dtype, device: str = "cpu", seconds: float = 0.5) -> float:
    """FLOP/s of the matrix product (m, k) @ (k, n) at its best."""
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype)
    return 2 * m * k * n / best_seconds(lambda: a @ b, seconds)


def peak_speed(dtype: torch.dtype, device: str = "cpu", sizes: Sequence[int] = ()) -> float:
    """FLOP/s of large matrix products, the best of a few sizes: the machine's ceiling."""
    sizes = sizes or ((4096, 8192) if device.startswith("cuda") else (1024, 2048, 3072))
    return max(product_speed(size, size, size, dtype, device) for size in sizes)


def stream_speed(threads: int = 0, gigabytes: float = 1.0, device: str = "cpu", seconds: float = 1.0) -> float:
    """Bytes/s at which so much memory is read once from end to end.

    Args:
        threads: 1 for one stream; 0 as many as torch takes.
    """
    numbers = torch.ones(int(gigabytes * 1e9 / 4), device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return 4 * numbers.numel() / best_seconds(numbers.sum, seconds)
    finally:
        torch.set_num_threads(before)


def gpt_matrices(n_layers: int, d_model: int, vocab_size: int) -> list[tuple[int, int]]:
    """The shapes of every matrix that a token of a GPT-2 passes through: (rows, columns), output by input."""
    block = [(3 * d_model, d_model), (d_model, d_model), (4 * d_model, d_model), (d_model, 4 * d_model)]
    return [*block * n_layers, (vocab_size, d_model)]


def vector_speed(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: str = "cpu", seconds: float = 2.0
) -> float:
    """Bytes/s of weights in one pass over all these matrices, each times a vector: the ceiling of sampling one text."""
    pairs = [
        (torch.randn(rows, columns, device=device).to(dtype), torch.randn(columns, device=device).to(dtype))
        for rows, columns in shapes
    ]
    n_bytes = sum(matrix.nbytes for matrix, _ in pairs)
    return n_bytes / best_seconds(lambda: [matrix @ vector for matrix, vector in pairs], seconds)


def flops_per_token(matrix_parameters: int, n_layers: int, width: int, context: int) -> int:
    """Operations for one token, forward and backward (Chowdhery et al. 2022, PaLM, appendix B): 6 for each parameter
    of a matrix product, 12 for each layer, feature of its heads and position of the context.

    What a causal mask could save is not taken off. The same formula for every contestant.
    """
    return 6 * matrix_parameters + 12 * n_layers * width * context
