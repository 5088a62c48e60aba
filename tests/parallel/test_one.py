"""What holds for a single process, with torchrun or without: sharing changes nothing, and only what is lost is lost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import LOST_PROCESS, UserError
from tests.parallel.programs import optimizer_of, plain, train
from training.device import DistContext, compile_model, first_difference, get_dist_context
from training.distributed import (
    clip_grad_norm,
    distribute,
    full_tensor,
    gather_weights,
    is_dtensor,
    is_fsdp,
    maybe_no_sync,
    own_round,
    process_group,
    unwrap_model,
    wrap_model,
)
from training.muon import Muon

CPU = DistContext(torch.device("cpu"), torch.float32)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
LOST = [
    RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:12504. This is typically caused by ..."),
    RuntimeError(f"{GLOO}pair.cc:537] Read error [127.0.0.1]:49536: Connection reset by peer. GLHF!"),
    RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"),
    RuntimeError(f"{GLOO}pair.cc:144] Application timeout caused pair closure"),
    dist.DistNetworkError("The client socket has timed out after 60000ms while trying to connect to (node-1, 29500)."),
    dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
    dist.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.27.5\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    ),
    dist.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, ...) ran for ..."),
]
OURS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 2x5)"),
    RuntimeError(f"[enforce fail at {GLOO[1:]}pair.cc:456] op.preamble.length <= op.nbytes. 16 vs 8"),
    RuntimeError("a loader timed out"),
    dist.DistBackendError(
        "NCCL error in: x.cpp:1, invalid usage\nncclInvalidUsage: This usually reflects invalid usage"
    ),
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
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(port))
    yield
    assert not dist.is_initialized(), "the group outlived the program"


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[-40:])
def test_a_lost_process_becomes_one_line(error: RuntimeError, torchrun: None) -> None:
    with pytest.raises(UserError) as caught, process_group(60):
        raise error
    assert caught.value.exit_code == LOST_PROCESS and "--run.resume" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", OURS, ids=lambda error: str(error)[-40:])
def test_any_other_error_stays_what_it_is(error: BaseException, torchrun: None) -> None:
    with pytest.raises(BaseException) as caught, process_group(60):
        raise error
    assert caught.value is error


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group(60):
        assert not dist.is_initialized()
        model = plain()
        assert wrap_model(model, get_dist_context("fp32"), "fsdp") is model  # nobody to share with
    with pytest.raises(RuntimeError), process_group(60):
        raise LOST[0]  # nobody to lose


def test_the_timeout_reaches_the_group(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    real = dist.init_process_group

    def init(*arguments: Any, **settings: Any) -> None:
        told.append(settings["timeout"])
        real(*arguments, **settings)

    monkeypatch.setattr(dist, "init_process_group", init)
    with process_group(7.5):
        assert told == [timedelta(seconds=7.5)]


def test_a_group_that_does_not_come_about_is_a_lost_process(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes never comes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught, process_group(1):
        pass
    assert caught.value.exit_code == LOST_PROCESS


def addresses(store: dist.Store, order: list[int]) -> list[list[str]]:
    """What each process of a start reads of the others', as gloo does, where they come in this order, well apart."""
    found: list[list[str]] = []

    def come(rank: int) -> None:
        mine = own_round(store, rank, len(order), 20)
        mine.set(f"address of {rank}", f"{rank} of {order}")
        found.append([mine.get(f"address of {other}").decode() for other in range(len(order))])

    threads = [threading.Thread(target=come, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    return found


def test_a_restart_reads_no_address_of_the_start_before() -> None:
    """Whoever comes first, and also after a start that ended before all had come."""
    store = dist.HashStore()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert addresses(store, order) == [[f"{rank} of {order}" for rank in range(3)]] * 3
        for rank in (1, 0):  # they come and end
            with pytest.raises(dist.DistStoreError):
                own_round(store, rank, 3, 0.1)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_one_process_under_torchrun_learns_what_one_does_without(sharding: str, torchrun: None) -> None:
    """Weights, moments and norms; a rounding more or less in Muon's sums in bf16 shows in the third digit of a step."""
    alone = plain()
    expected = optimizer_of(alone)
    norms = train(alone, CPU, expected, range(3))
    with process_group(60):
        ctx, model = get_dist_context("fp32"), plain()
        stepped = wrap_model(model, ctx, sharding)
        assert (stepped is model) == (sharding == "none") and is_fsdp(stepped) == (sharding == "fsdp")
        optimizer = optimizer_of(stepped)
        assert train(stepped, ctx, optimizer, range(3)) == pytest.approx(norms, rel=1e-4)
        with torch.no_grad():
            stepped(torch.zeros(1, 4, dtype=torch.long))  # an evaluation
        gather_weights(stepped, model)
        assert all(is_dtensor(p) == (sharding == "fsdp") for p in stepped.parameters())
        moments = optimizer.state_dict()
        assert model.lm_head.weight is model.token_embedding.weight
        assert unwrap_model(stepped).lm_head.weight is unwrap_model(stepped).token_embedding.weight
    for first, a, b in zip(plain().parameters(), alone.parameters(), model.parameters(), strict=True):
        assert (a - b).norm() <= 0.02 * (a - first).norm()
    found = expected.state_dict()
    assert moments.keys() == found.keys()
    assert all((moments[key] - found[key]).norm() <= 0.02 * found[key].norm() for key in found)


def test_muon_of_a_split_matrix_is_torchs_muon(torchrun: None) -> None:
    """The same gradients, four steps: no more than the last digits apart."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((30, 8), (8, 30)):
        value = torch.randn(shape, generator=generator)
        gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
        with process_group(60):
            apart = nn.Parameter(distribute_tensor(value, init_device_mesh("cpu", (1,)), [Shard(0)]))
            one = nn.Parameter(value.clone())
            settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
            mine, theirs = Muon([apart], **settings), torch.optim.Muon([one], **settings)  # type: ignore[arg-type]
            for gradient in gradients:
                apart.grad, one.grad = distribute(gradient, apart), gradient.clone()
                mine.step()
                theirs.step()
            buffers = (mine.state[apart]["momentum_buffer"], theirs.state[one]["momentum_buffer"])
            for a, b in ((apart, one), buffers):
                assert (full_tensor(a) - b).norm() <= 1e-6 * b.norm()


def test_split_moments_are_taken_up_as_they_were(torchrun: None) -> None:
    model = plain()
    optimizer = optimizer_of(model)
    train(model, CPU, optimizer, range(2))
    saved = {key: value.clone() for key, value in optimizer.state_dict().items()}
    with process_group(60):
        stepped = wrap_model(model, get_dist_context("fp32"), "fsdp")
        again = optimizer_of(stepped)
        again.load_state_dict(saved)
        assert all(is_dtensor(value) for _, value in again.named_state() if value.dim())
        assert all(torch.equal(value, saved[key]) for key, value in again.state_dict().items())
        with pytest.raises(ValueError):
            again.load_state_dict({**saved, "nobody/exp_avg": torch.zeros(2)})


def test_gradients_wait_for_the_last_piece_also_when_compiled(torchrun: None) -> None:
    """torch.compile's wrapper stands around what shares the gradients."""
    with process_group(60):
        shared = DistributedDataParallel(plain())
        wrapper = nn.Module()  # as torch.compile has it; the real one is tried by test_many.py
        wrapper._orig_mod = shared
        for stepped in (shared, wrapper):
            with maybe_no_sync(stepped, False):
                assert not shared.require_backward_grad_sync
            with maybe_no_sync(stepped, True):
                assert shared.require_backward_grad_sync
            assert list(unwrap_model(stepped).state_dict()) == list(plain().state_dict())


def test_a_gradient_is_cut_to_its_limit_or_left_alone() -> None:
    model = nn.Linear(3, 1, bias=False)
    for limit, expected in ((0.0, 5.0), (10.0, 5.0), (1.0, 1.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
        assert clip_grad_norm(model, limit) == 5.0
        assert float(model.weight.grad.norm()) == pytest.approx(expected)
    model.weight.grad = torch.tensor([[torch.inf, 0.0, 0.0]])
    assert clip_grad_norm(model, 1.0) == torch.inf


def test_a_machine_of_its_own_agrees_with_itself() -> None:
    assert CPU.all_reduce_max(3) == 3 and CPU.broadcast_str("a") == "a" and float(CPU.sum(torch.tensor(2.0))) == 2.0
    CPU.check_same_everywhere({"the data": "a"})
    assert first_difference("a\nb\nc", "a\nd\nc") == ("b", "d") and first_difference("a", "a\nb") == ("", "b")


def test_all_go_on_uncompiled_where_one_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(DistContext):
        """A process that hears from another one that its compiler failed."""

        def largest(self, value: int) -> int:
            return max(value, 1)

    monkeypatch.setattr(torch, "compile", lambda model: nn.Sequential(model))
    model, example = plain(), torch.zeros(1, 4, dtype=torch.long)
    assert compile_model(model, example, Other(CPU.device, CPU.dtype)) == (model, False)
    fast, is_compiled = compile_model(model, example, CPU)
    assert fast is not model and all(p.grad is None for p in model.parameters())
    assert is_compiled


def test_the_blocks_of_a_split_model_are_compiled_in_place(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(block: nn.Module) -> None:
        block._compiled_call_impl = block._call_impl

    monkeypatch.setattr(nn.Module, "compile", pretend)
    with process_group(60):
        stepped = wrap_model(plain(), get_dist_context("fp32"), "fsdp")
        assert compile_model(stepped, torch.zeros(1, 4, dtype=torch.long), CPU) == (stepped, True)
