"""CUDA graphs: the operations of one token in a single launch (`model/recorded.py` says why)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from model.gpt import GPT, Block
from model.recorded import Record, Step

WARM_UP = 3
"""Calls before the recording, on a stream of their own: libraries choose algorithms and take memory then."""


def cuda_graph(step: Step) -> Step:
    """`step` as a CUDA graph, whose replay writes to the tensor that is returned every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def recorder(model: GPT) -> Record | None:
    """What records a token of this model: CUDA graphs on a GPU, nothing elsewhere or where it would miss something."""
    return cuda_graph if model.token_embedding.weight.device.type == "cuda" and may_record(model) else None


def may_record(model: GPT) -> bool:
    """Not where attention is written out, which needs another mask, nor where a hook waits: a replay calls nothing."""
    fused = all(cast(Block, block).attention.fused for block in model.blocks)
    return fused and not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
