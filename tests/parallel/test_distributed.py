"""The distributed code in a single process, and the rules of `training/device.py` that it shares."""

from collections.abc import Iterator
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common.errors import LOST_PROCESS, UserError
from model.gpt import GPT
from tests.parallel.programs import tiny_model, tiny_optimizer, train
from tests.runs import free_port, user_error
from training.device import DistContext, get_dist_context
from training.distributed import (
    clip_grad_norm,
    gather_weights,
    is_dtensor,
    is_fsdp,
    process_group,
    unwrap_model,
    wrap_model,
)

CPU = DistContext(torch.device("cpu"), torch.float32)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
LOST = [
    RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:12504. This is typically caused by ..."),
    RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"),
    dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94\nncclRemoteError: a remote process exited prematurely."),
]
OTHER = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 2x5)"),
    dist.DistBackendError("NCCL error in: x.cpp:1\nncclInvalidUsage: This usually reflects invalid usage"),
    UserError("out of memory", 6),
    SystemExit(143),
]


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a job of one process."""
    env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    yield
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [*LOST, *OTHER], ids=lambda error: str(error)[-40:])
def test_lost_process_is_one_line_and_other_errors_are_not_changed(error: BaseException, torchrun: None) -> None:
    with pytest.raises(BaseException) as caught, process_group(60):
        raise error
    if error in OTHER:
        assert caught.value is error
    else:
        assert isinstance(caught.value, UserError) and caught.value.exit_code == LOST_PROCESS
        assert "--run.resume" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group(60):
        assert not dist.is_initialized()
        model = tiny_model()
        assert wrap_model(model, get_dist_context("fp32"), "fsdp") is model


def test_incomplete_environment_and_missing_gpu_are_one_line(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="this machine has 1 GPU: start torchrun with"), process_group(60):
        pass
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="RANK is set, but not LOCAL_RANK: start with torchrun"), process_group(60):
        pass


def test_missing_process_is_a_lost_process(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with user_error(LOST_PROCESS), process_group(1):
        pass


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_one_process_under_torchrun_trains_like_one_without(sharding: str, torchrun: None) -> None:
    plain = tiny_model()
    expected = tiny_optimizer(plain)
    norms = train(plain, CPU, expected, range(3))
    with process_group(60):
        ctx, model = get_dist_context("fp32"), tiny_model()
        wrapped = wrap_model(model, ctx, sharding)
        assert (wrapped is model) == (sharding == "none") and is_fsdp(wrapped) == (sharding == "fsdp")
        optimizer = tiny_optimizer(wrapped)
        assert train(wrapped, ctx, optimizer, range(3)) == pytest.approx(norms, rel=1e-4)
        with torch.no_grad():
            wrapped(torch.zeros(1, 4, dtype=torch.long))  # an evaluation
        gather_weights(wrapped, model)
        assert all(is_dtensor(p) == (sharding == "fsdp") for p in wrapped.parameters())
        for module in (model, unwrap_model(wrapped)):
            assert cast(GPT, module).lm_head.weight is cast(GPT, module).token_embedding.weight
        with pytest.raises(ValueError):
            optimizer.load_state_dict({**optimizer.state_dict(), "nobody/exp_avg": torch.zeros(2)})
    for first, a, b in zip(tiny_model().parameters(), plain.parameters(), model.parameters(), strict=True):
        assert (a - b).norm() <= 0.02 * (a - first).norm()  # Muon rounds to bf16


def test_gradient_is_clipped_or_left_alone() -> None:
    model = nn.Linear(3, 1, bias=False)
    for limit, expected in ((0.0, 5.0), (10.0, 5.0), (1.0, 1.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
        assert clip_grad_norm(model, limit) == 5.0
        assert float(model.weight.grad.norm()) == pytest.approx(expected)
    model.weight.grad = torch.tensor([[torch.inf, 0.0, 0.0]])
    assert clip_grad_norm(model, 1.0) == torch.inf
