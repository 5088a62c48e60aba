"""The distributed code in a single process, and the rules of `training/device.py` that it shares."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import LOST_PROCESS, UserError
from model.gpt import GPT
from tests.parallel.programs import tiny_model, tiny_optimizer, train
from training.device import DistContext, compile_model, first_difference, get_dist_context
from training.distributed import (
    clip_grad_norm,
    fresh_store,
    gather_weights,
    is_dtensor,
    is_fsdp,
    maybe_no_sync,
    process_group,
    unwrap_model,
    wrap_model,
)

CPU = DistContext(torch.device("cpu"), torch.float32)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
LOST = [
    RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:12504. This is typically caused by ..."),
    RuntimeError(f"{GLOO}pair.cc:537] Read error [127.0.0.1]:49536: Connection reset by peer. GLHF!"),
    RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"),
    RuntimeError(f"{GLOO}pair.cc:144] Application timeout caused pair closure"),
    dist.DistNetworkError("The client socket has timed out after 60000ms while trying to connect to (node-1, 29500)."),
    dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94\nncclRemoteError: a remote process exited prematurely."),
    dist.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, ...) ran for ..."),
]
OTHER = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 2x5)"),
    RuntimeError(f"[enforce fail at {GLOO[1:]}pair.cc:456] op.preamble.length <= op.nbytes. 16 vs 8"),
    RuntimeError("a loader timed out"),
    dist.DistBackendError("NCCL error in: x.cpp:1\nncclInvalidUsage: This usually reflects invalid usage"),
    UserError("out of memory", 6),
    ValueError("a bug"),
    SystemExit(143),
    KeyboardInterrupt(),
]


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a job of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    yield
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[-40:])
def test_lost_process_is_one_line(error: RuntimeError, torchrun: None) -> None:
    with pytest.raises(UserError) as caught, process_group(60):
        raise error
    assert caught.value.exit_code == LOST_PROCESS and "--run.resume" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[-40:])
def test_other_errors_are_not_changed(error: BaseException, torchrun: None) -> None:
    with pytest.raises(BaseException) as caught, process_group(60):
        raise error
    assert caught.value is error


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group(60):
        assert not dist.is_initialized()
        model = tiny_model()
        assert wrap_model(model, get_dist_context("fp32"), "fsdp") is model


def test_missing_process_is_a_lost_process(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught, process_group(1):
        pass
    assert caught.value.exit_code == LOST_PROCESS


def start_once(store: dist.Store, order: list[int]) -> list[list[str]]:
    """What each process of a start reads of the others when they arrive in this order."""
    found: list[list[str]] = []

    def arrive(rank: int) -> None:
        mine = fresh_store(store, rank, len(order), 20)
        mine.set(f"address {rank}", f"{rank} of {order}")
        found.append([mine.get(f"address {other}").decode() for other in range(len(order))])

    threads = [threading.Thread(target=arrive, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    return found


def test_restart_reads_no_address_of_an_earlier_start() -> None:
    store = dist.HashStore()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert start_once(store, order) == [[f"{rank} of {order}" for rank in range(3)]] * 3
        for rank in (1, 0):  # a start that ends before all have come
            with pytest.raises(dist.DistStoreError):
                fresh_store(store, rank, 3, 0.1)


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
        state = optimizer.state_dict()
        for module in (model, unwrap_model(wrapped)):
            assert cast(GPT, module).lm_head.weight is cast(GPT, module).token_embedding.weight
        again = tiny_optimizer(wrapped)
        again.load_state_dict(state)
        assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
        with pytest.raises(ValueError):
            again.load_state_dict({**state, "nobody/exp_avg": torch.zeros(2)})
    for first, a, b in zip(tiny_model().parameters(), plain.parameters(), model.parameters(), strict=True):
        assert (a - b).norm() <= 0.02 * (a - first).norm()  # Muon rounds to bf16
    found = expected.state_dict()
    assert state.keys() == found.keys()
    assert all((state[key] - found[key]).norm() <= 0.02 * found[key].norm() for key in found)


def test_no_sync_reaches_through_torch_compile(torchrun: None) -> None:
    with process_group(60):
        ddp = DistributedDataParallel(tiny_model())
        compiled = nn.Module()  # like torch.compile's wrapper
        compiled._orig_mod = ddp
        for model in (ddp, compiled):
            with maybe_no_sync(model, False):
                assert not ddp.require_backward_grad_sync
            with maybe_no_sync(model, True):
                assert ddp.require_backward_grad_sync
            assert list(unwrap_model(model).state_dict()) == list(tiny_model().state_dict())


def test_gradient_is_clipped_or_left_alone() -> None:
    model = nn.Linear(3, 1, bias=False)
    for limit, expected in ((0.0, 5.0), (10.0, 5.0), (1.0, 1.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
        assert clip_grad_norm(model, limit) == 5.0
        assert float(model.weight.grad.norm()) == pytest.approx(expected)
    model.weight.grad = torch.tensor([[torch.inf, 0.0, 0.0]])
    assert clip_grad_norm(model, 1.0) == torch.inf


def test_one_process_agrees_with_itself() -> None:
    assert CPU.all_reduce_max(3) == 3 and CPU.broadcast_str("a") == "a"
    assert float(CPU.all_reduce_sum(torch.tensor(2.0))) == 2.0
    CPU.check_same_everywhere({"the data": "a"})
    assert first_difference("a\nb\nc", "a\nd\nc") == ("b", "d") and first_difference("a", "a\nb") == ("", "b")


def test_nothing_is_compiled_where_another_process_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherFails(DistContext):
        def all_reduce_max(self, value: int) -> int:
            return max(value, 1)

    monkeypatch.setattr(torch, "compile", nn.Sequential)
    model, example = tiny_model(), torch.zeros(1, 4, dtype=torch.long)
    assert compile_model(model, example, OtherFails(CPU.device, CPU.dtype)) == (model, False)
    compiled, is_compiled = compile_model(model, example, CPU)
    assert compiled is not model and is_compiled and all(p.grad is None for p in model.parameters())


def test_fsdp_blocks_are_compiled_in_place(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    with process_group(60):
        model = wrap_model(tiny_model(), get_dist_context("fp32"), "fsdp")
        assert compile_model(model, torch.zeros(1, 4, dtype=torch.long), CPU) == (model, True)
        assert all(block in compiled for block in cast(GPT, model).blocks)
