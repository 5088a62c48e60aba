"""The loss has the library's gradient, and needs no second copy of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.dataloader import IGNORE_INDEX
from training import loss
from training.loss import cross_entropy_sum

B, T, V = 3, 5, 7


def sample_indices(dtype: torch.dtype, shape: tuple[int, ...] = (B, T, V)) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every fourth does not count."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    targets.view(-1)[::4] = IGNORE_INDEX
    return (4 * torch.randn(shape, generator=generator)).to(dtype), targets


@pytest.mark.parametrize("chunk", [1, 2 * V, 4 * V, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_bits_of_the_librarys(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, a few with a rest, or all at once; scaled as a step scales it."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    logits, targets = sample_indices(dtype)
    gradients, values = [], []
    for ours in (True, False):
        start = logits.clone().requires_grad_()
        copy = start * 1  # a result, as the logits of a model are
        flat = copy.float().flatten(0, 1), targets.flatten()
        value = (
            cross_entropy_sum(copy, targets)
            if ours
            else F.cross_entropy(*flat, ignore_index=IGNORE_INDEX, reduction="sum")
        )
        (value / 11 * 2).backward()
        gradients.append(start.grad)
        values.append(value.detach())
    assert torch.equal(*gradients)
    assert values[0] == pytest.approx(float(values[1]), rel=1e-6)


def test_nothing_that_counts_is_no_loss() -> None:
    logits, targets = sample_indices(torch.float32)
    assert cross_entropy_sum(logits, torch.full_like(targets, IGNORE_INDEX)) == 0


def test_a_second_backward_pass_is_refused() -> None:
    """The logits are gone by then."""
    logits, targets = sample_indices(torch.float32)
    value = cross_entropy_sum(logits.requires_grad_() * 1, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        value.backward()


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.known = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_logits_is_made(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 50,257 tokens: the library's loss makes them three times more in fp32; ours keeps to its chunk."""
    monkeypatch.setattr(loss, "CHUNK", 1 << 16)
    generator = torch.Generator().manual_seed(1)
    features, head = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 64, 2), (50_257, 2)))
    logits = features.requires_grad_() @ head.requires_grad_().T
    with Largest() as seen:
        cross_entropy_sum(logits, torch.zeros(2, 64, dtype=torch.long)).backward()
    assert 0 < seen.bytes <= 8 * 50_257 < logits.nbytes / 10  # a row in fp32, or the gradient of the head
