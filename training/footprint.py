"""Memory of a training step, by part, counted without using any.

`train.py --plan` asks it. The real model, loss and optimizer make a real step on tensors that have a shape and a place
but no content (torch's fake tensors), while every block of memory is counted as it comes and goes. So whatever the
model, its two faces or the loss keep is counted as it is, for a model of any size, in seconds.

What is not seen: the scratch space of single kernels, what the allocator holds back, and the libraries themselves.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.dataloader import Batch
from data.prepare import TokenizedCorpus
from data.token_dataset import TokenSplit
from model.gpt import GPT
from training.checkpoint import TrainState
from training.config import RunConfig
from training.device import DistContext
from training.optimizer import Optimizer
from training.trainer import Trainer


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process, weights not split.

    What a block keeps for its backward pass is what Korthikanti et al. 2022, section 4, add up for a GPT in 16 bits;
    here it is counted, since ours keeps other things: fp32 residuals, rotary angles, either face of attention.
    """

    weights: int
    gradients: int
    moments: int
    copies: int
    """Weights in the number format of the products, kept until the backward pass has used them."""
    activations: int
    """What the blocks, the embedding and the last norm keep for the backward pass, of one micro-batch."""
    loss: int
    """What is there besides at the moment of most memory in a step: logits, their softmax and gradient."""
    peak: int
    """The most at any moment of a step; below the sum, for gradients come while activations go."""
    attention: int
    """Calls of operations that compute something, in one micro-batch, forward and backward."""
    moves: int
    """The same of the optimizer's step."""
    block: int
    """Bytes of the weights of the largest block."""
    outside: int
    """Bytes of the weights outside the blocks."""

    @property
    def states(self) -> int:
        """What is there between steps, and the gradient."""
        return self.weights + self.gradients + self.moments

    def sharded(self, world: int, pieces: int) -> int:
        """An estimate of the peak where `world` processes split weights, gradients and moments.

        That is stage 3 of Rajbhandari et al. 2020; FSDP2 here. Each has its share of all three. Put together are what
        lies outside the blocks, throughout the step, two blocks, and the gradient of one of these; with several
        micro-batches the whole gradient, until the last (`training/distributed.py`).
        """
        share = (self.weights + self.moments) // world
        gradient = self.gradients if pieces > 1 else self.gradients // world + max(self.block, self.outside)
        together = self.outside + 2 * self.block
        return share + gradient + together + self.copies + self.activations + self.loss


class Blocks(TorchDispatchMode):
    """Every block of memory that operations allocate, from its coming to its going, and the most there was at once."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights  # keys of blocks
        self.copies: dict[int, int] = {}  # of weights in another number format, with their number of axes
        self.sizes = dict.fromkeys(weights, 0)  # bytes of each block; the weights are not counted
        self.now = self.peak = self.attention = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        came = [self.count(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.attention += any(came) or function._schema.is_mutable
        if function is torch.ops.aten._to_copy.default and key(args[0]) in self.weights:
            self.copies[key(result)] = result.dim()
        return result

    def count(self, tensor: Tensor) -> bool:
        """Take note of the memory that a tensor lies in; whether it is new."""
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self.sizes:
            return False
        self.sizes[name] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, name)
        return True

    def gone(self, name: int) -> None:
        """A block is given back."""
        self.now -= self.sizes.pop(name)
        self.copies.pop(name, None)


class Kept:
    """What autograd keeps for the backward pass: each block of memory once, weights left out."""

    def __init__(self, blocks: Blocks, model: GPT) -> None:
        self.blocks, self.seen = blocks, set[int]()
        self.activations = self.copies = 0
        self.in_model = True
        model.token_embedding.register_forward_pre_hook(lambda *_: self.begin())
        model.final_norm.register_forward_hook(lambda *_: self.leave())

    def begin(self) -> None:
        """Another micro-batch: what the one before kept is gone."""
        self.seen, self.activations, self.copies, self.in_model = set(), 0, 0, True

    def leave(self) -> None:
        """From here on it is head and loss. Matrices are kept, even where a layer packs itself what it keeps."""
        self.in_model = False
        for name in (name for name, axes in self.blocks.copies.items() if axes > 1 and name not in self.seen):
            self.seen.add(name)
            self.copies += self.blocks.sizes[name]

    def pack(self, tensor: Tensor) -> Tensor:
        name, size = key(tensor), tensor.untyped_storage().nbytes()
        if name not in self.seen and name not in self.blocks.weights:
            self.seen.add(name)
            if name in self.blocks.copies:
                self.copies += size
            elif self.in_model:
                self.activations += size
        return tensor


def key(tensor: Tensor) -> int:
    """Which block of memory a tensor lies in."""
    return cast(int, tensor.untyped_storage()._cdata)


def footprint(config: RunConfig, vocab_size: int, ctx: DistContext, rows: int, pieces: int = 1) -> Footprint:
    """The memory of a step of `pieces` micro-batches of `rows` windows each.

    Args:
        config: its `model.attention` decided.
        machine: whose device and number format are taken; how many processes there are is not looked at.
    """
    alone = replace(ctx, rank=0, world_size=1)
    with FakeTensorMode():
        model = built(config, vocab_size, alone.device)
        blocks = Blocks({key(p) for p in model.parameters()})
        kept = Kept(blocks, model)
        weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
        trainer = stand_in(config, vocab_size, alone, model, rows)
        one, many = (nothing(count, config.model.context, alone.device) for count in (1, rows))
        with blocks, torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            trainer.forward_backward(one, 1)  # moments come with the first step
            trainer.optimizer.step()
            moments = sum(bytes_of(value) for _, value in trainer.optimizer.named_state())
            before = blocks.now
            if pieces > 1:  # what an earlier piece has left
                trainer.forward_backward(one, 1)
            first, blocks.peak = blocks.attention, blocks.now
            trainer.forward_backward(many, 1)
            highest, kernels = blocks.peak - before, blocks.attention - first
            gradients = sum(bytes_of(p.grad) for p in model.parameters() if p.grad is not None)
            first, blocks.peak = blocks.attention, blocks.now
            trainer.optimizer.step()
            stepping, moves = blocks.peak - before, blocks.attention - first
    held = gradients if pieces > 1 else 0
    sizes = [sum(bytes_of(p) for p in block.parameters()) for block in model.blocks]
    return Footprint(
        weights=weights,
        gradients=gradients,
        moments=moments,
        copies=kept.copies,
        activations=kept.activations,
        loss=max(0, highest - held - kept.copies - kept.activations),
        peak=weights + moments + max(highest, stepping),
        attention=kernels,
        moves=moves,
        block=max(sizes),
        outside=weights - sum(sizes),
    )


def nothing(rows: int, context: int, device: torch.device) -> Batch:
    """A batch of the first token."""
    tokens, targets = (torch.zeros(rows, context, dtype=torch.long, device=device) for _ in range(2))
    return Batch(tokens, targets)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's own numbers."""
    return tensor.numel() * tensor.element_size()


def built(config: RunConfig, vocab_size: int, device: torch.device) -> GPT:
    """The model on `device`, its weights not drawn."""
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
    model.lm_head.weight = model.token_embedding.weight
    return model


def stand_in(
    config: RunConfig,
    vocab_size: int,
    ctx: DistContext,
    model: GPT,
    rows: int,
    pieces: int = 1,
    seed: int = 0,
    stepped: nn.Module | None = None,
) -> Trainer:
    """The real loop around a model, on random tokens instead of a corpus; nothing is read or written."""
    train = replace(
        config.train, batch_size=rows * pieces, micro_batch_size=rows, steps=1 << 40, skip_nonfinite_steps=1 << 40
    )
    run = replace(config.run, seed=seed, resume="", stop_at_step=0)
    optimizer = Optimizer(model, config.optim)
    tokens = np.random.default_rng(seed).integers(vocab_size, size=64 * (config.model.context + 1), dtype=np.uint32)
    text = TokenSplit((tokens,), np.zeros(1, np.int64), len(tokens))
    data = TokenizedCorpus("random tokens", Path(), cast(Any, None), text, text, "", None)
    changed = replace(config, train=train, run=run)
    return Trainer(changed, ctx, data, model, model if stepped is None else stepped, optimizer, TrainState())
