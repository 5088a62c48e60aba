"""Chunked cross-entropy: torch's gradient, without a second copy of the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataloader import IGNORE_INDEX
from training import loss
from training.loss import cross_entropy_sum

B, T, V = 3, 5, 7


@pytest.mark.parametrize("chunk", [1, 2 * V, 4 * V, 1 << 22])  # one row, a few with a rest, all at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_equals_torchs(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(V, (B, T), generator=generator)
    targets.view(-1)[::4] = IGNORE_INDEX
    logits = (4 * torch.randn(B, T, V, generator=generator)).to(dtype)

    def torch_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")

    gradients, values = list[Tensor](), list[float]()
    for function in (cross_entropy_sum, torch_loss):
        start = logits.clone().requires_grad_()
        value = function(start * 1, targets)  # not a leaf, like the logits of a model
        gradients += torch.autograd.grad(value / 11 * 2, start)
        values.append(float(value.detach()))
    assert torch.equal(gradients[0], gradients[1])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert cross_entropy_sum(logits, torch.full_like(targets, IGNORE_INDEX)) == 0


def test_gradient_takes_the_memory_of_the_logits() -> None:
    logits = torch.randn(2, 3, 5).requires_grad_() * 1
    gradients = list[Tensor]()
    logits.register_hook(gradients.append)
    cross_entropy_sum(logits, torch.zeros(2, 3, dtype=torch.long)).backward()
    assert gradients[0].data_ptr() == logits.data_ptr()
