"""Muon over stacked matrices and AdamW are torch's, bit for bit, and do what their formulas say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training.stepper import AdamW

from training import muon
from training.muon import Muon, orthogonalize

SHAPES = [(24, 8), (8, 24), (16, 16), (8, 24), (24, 8), (24, 8), (1, 8), (8, 1), (24, 8)]
"""Tall, wide and square, in an order that mixes those of one shape with others."""


def sample_indices(generator: torch.Generator) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("stacked", [1, 2 * 24 * 8, 1 << 22])
def test_five_steps_give_the_bits_of_torchs_muon(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a stack; gradients of every size, a zero one, a missing one; a rate that falls."""
    monkeypatch.setattr(muon, "STACKED", stacked)
    generator = torch.Generator().manual_seed(1)
    mine = sample_indices(generator)
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = Muon(mine, lr=0.02, weight_decay=0.1, momentum=0.9)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for step in range(5):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator) * 10.0 ** (i - 4) * (i != 3)
            a.grad, b.grad = (None, None) if i == step else (gradient, gradient.clone())
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(ours.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])


def test_five_steps_of_adamw_give_the_bits_of_torchs() -> None:
    """Two groups with rates and decays of their own; a zero gradient, a missing one; a rate that falls."""
    generator = torch.Generator().manual_seed(1)
    mine = sample_indices(generator)
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    sorts = [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.0}]
    groups = [[{"params": p[i::2], **sorts[i]} for i in range(2)] for p in (mine, theirs)]
    ours = AdamW(groups[0], 0.8, 0.95)
    reference = torch.optim.AdamW(groups[1], betas=(0.8, 0.95), fused=True)
    for step in range(5):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator) * 10.0 ** (i - 4) * (i != 3)
            a.grad, b.grad = (None, None) if i == step else (gradient, gradient.clone())
        for optimizer in (ours, reference):
            optimizer.param_groups[1]["lr"] = 0.02 / (step + 1)
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert ours.state[a].keys() == reference.state[b].keys()
        assert all(torch.equal(value, reference.state[b][key]) for key, value in ours.state[a].items())


@pytest.mark.parametrize("shape", [(3, 32, 8), (3, 8, 32), (2, 16, 16)])
def test_every_direction_gets_about_the_same_step(shape: tuple[int, ...]) -> None:
    """The singular vectors stay, the singular values come near 1, however unlike the matrices of a stack are."""
    generator = torch.Generator().manual_seed(2)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(1, 0.2, u.shape[-1])
    scale = 10.0 ** torch.arange(shape[0])[:, None, None]
    found = orthogonalize(scale * (u * values) @ vh).float()
    inside = u.mT @ found @ vh.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 0.02
    assert orthogonalize(torch.zeros(shape)).count_nonzero() == 0
