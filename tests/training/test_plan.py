"""`train.py --plan`: parameters, FLOPs and memory against the real model, optimizer and autograd; the printed page."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import chunked_attention
from model.config import ATTENTION_IMPLEMENTATIONS, ModelConfig
from model.gpt import GPT
from tests.runs import ROOT, TINY, error_line, script
from training import plan as planning
from training.config import OptimConfig, RunConfig, TrainConfig
from training.device import DistContext
from training.flops import count_parameters, flops_per_token, step_flops
from training.hardware import GPU, GPUS, parse_plan_option
from training.optimizer import Optimizer
from training.plan import activation_bytes, estimate_memory

PRESETS = ("glass", "gpt2", "llama", "qwen3", "toy")
TOY = {"preset": "glass", "norm": "none", "positions": "none", "mlp": "none", "d_mlp": 0, "tie_embeddings": False}
V, T, B = 61, 24, 3
BF16, FP32 = torch.bfloat16, torch.float32
CPU = DistContext(torch.device("cpu"), FP32)


def shape(preset: str, attention: str = "eager", n_kv_heads: int = 0, **settings: Any) -> ModelConfig:
    sizes = {"n_layers": 1, "n_heads": 4, "d_model": 32, "context": T, **settings}
    sizes |= TOY if preset == "toy" else {"preset": preset}
    return ModelConfig(attention=attention, n_kv_heads=n_kv_heads, **sizes)  # type: ignore[arg-type]


def run_config(model: ModelConfig, optimizer: str = "muon") -> RunConfig:
    optim = OptimConfig(optimizer=optimizer)  # type: ignore[arg-type]
    return RunConfig(model=model, optim=optim, train=TrainConfig(batch_size=B))


def n_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_flops_are_those_of_the_model(preset: str, attention: str) -> None:
    config = shape(preset, attention, 2, d_head=12, d_mlp=40, n_layers=2)
    model, cost, tokens = GPT(config, V), flops_per_token(config, V), torch.randint(V, (B, T))
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):  # it does not know the fused kernel
        logits = model(tokens)
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        logits.sum().backward()
    assert forward.get_total_flops() == cost * B * T and backward.get_total_flops() == 2 * cost * B * T
    assert step_flops(run_config(config), V) == 3 * cost * B * T


@pytest.mark.parametrize(
    ("preset", "optimizer"), [("glass", "muon"), ("gpt2", "adamw"), ("qwen3", "muon"), ("toy", "muon")]
)
def test_parameters_and_states_take_the_planned_memory(preset: str, optimizer: str) -> None:
    config = run_config(shape(preset, n_kv_heads=2), optimizer)
    parts, model = count_parameters(config.model, V), GPT(config.model, V)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    for part, word in (("MLP", ".mlp."), ("embeddings", "embedding")):
        assert parts.get(part, 0) == sum(p.numel() for name, p in model.named_parameters() if word in name)
    planned, state = estimate_memory(config, V, FP32, B), Optimizer(model, config.optim)
    model(torch.zeros(B, T, dtype=torch.long)).sum().backward()
    assert planned["parameters"] == n_bytes(model.parameters())
    assert planned["gradients"] == n_bytes(p.grad for p in model.parameters())
    state.step()
    assert planned["optimizer"] == n_bytes(value for _, value in state.state_dict().items() if value.dim())


class RecordStorages(TorchDispatchMode):
    """The storages of all results of operations that happen in it, each with its size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[StorageWeakRef, torch.Size, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages.append((StorageWeakRef(storage), x.shape, storage.nbytes()))
        return result


def kept_bytes(config: ModelConfig, dtype: torch.dtype, rows: int) -> int:
    """Bytes in use between forward and backward pass of all but the LM head, without parameters and their copies."""
    model, tokens, record = GPT(config, V), torch.zeros(rows, config.context, dtype=torch.long), RecordStorages()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    with record, replace(CPU, dtype=dtype).autocast():
        y = model.hidden_states(tokens)
    kept = {ref.cdata: size for ref, shape, size in record.storages if not ref.expired() and shape not in shapes}
    assert y.grad_fn is not None
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_activations_are_what_a_forward_pass_keeps(preset: str, attention: str, dtype: torch.dtype) -> None:
    for n_kv_heads, d_mlp, context, dropout in ((2, 96, 128, 0.0), (4, 160, 64, 0.1)):
        config = shape(preset, attention, n_kv_heads, d_model=64, d_mlp=d_mlp, context=context, dropout=dropout)
        two = replace(config, n_layers=2)
        layer = kept_bytes(two, dtype, 4) - kept_bytes(config, dtype, 4)
        assert activation_bytes(config, 4, dtype.itemsize) * 4 * context == pytest.approx(layer, rel=0.15)


@pytest.mark.parametrize("preset", PRESETS)
def test_large_activations_are_not_kept(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape(preset, "chunked", d_model=64, context=64, dropout=0.1)
    with_all = kept_bytes(config, BF16, 4)
    for module in (chunked_attention, planning):
        monkeypatch.setattr(module, "RECOMPUTE_ABOVE", 0)
    two = kept_bytes(replace(config, n_layers=2), BF16, 4)
    one = kept_bytes(config, BF16, 4)
    assert one < with_all
    assert activation_bytes(config, 4, 2) * 4 * 64 == pytest.approx(two - one, rel=0.15)


@pytest.mark.parametrize(
    ("argv", "rest", "target"),
    [
        (["--plan", "a.toml", "--train.steps=5"], ["a.toml", "--train.steps=5"], (None, 1)),
        (["a.toml", "--plan", "8xH100", "--run.seed", "2"], ["a.toml", "--run.seed", "2"], (GPUS["h100"], 8)),
        (["--plan=4xa100"], [], (GPUS["a100-80"], 4)),
        (["a.toml", "--plan=RTX4090"], ["a.toml"], (GPUS["rtx4090"], 1)),
        (["a.toml"], ["a.toml"], None),
    ],
)
def test_plan_option_is_parsed(argv: list[str], rest: list[str], target: tuple[GPU | None, int] | None) -> None:
    assert parse_plan_option(argv) == (rest, target)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with its cache, where measuring is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "MEASURE_SECONDS", 0.05)
    return tmp_path


def page(*argv: object) -> str:
    done = script("train.py", *argv)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    """The number that a pattern finds."""
    return float(re.search(pattern, text, re.M)[1].replace(",", ""))  # type: ignore[index]


def test_page_of_this_machine_and_a_corpus(folder: Path) -> None:
    (folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    out = page("--plan", *TINY, f"--data.source={folder / 'fox.txt'}", "--train.steps=56")
    assert out.startswith("plan       fox on this machine: cpu, ")
    assert "fox.txt; vocabulary of 97 (assumed" in out and "56 steps of 4 x 16 tokens: 3,584 tokens\n" in out
    model = GPT(shape("glass", n_layers=2, n_heads=2, d_model=16), 97)
    assert number(r"^  total +([\d,]+)$", out) == sum(p.numel() for p in model.parameters())
    assert "it fits" in out and "measured here" in out and number(r"a step +([\d.e-]+) s: [\d,]+ tokens/s", out) > 0
    assert "with 19 evaluations" in out and [path.name for path in folder.iterdir()] == ["fox.txt"]


def test_page_of_eight_gpus(folder: Path) -> None:
    out = page(ROOT / "configs/gpt2_124m.toml", "--model.n_layers=2", "--data.tokenizer=byte", "--plan", "8xh100")
    assert "8 x H100 SXM, bf16, sdpa attention" in out and "vocabulary of 257 (256 bytes and end-of-text)" in out
    assert "data       hf:HuggingFaceFW/fineweb-edu:sample/10BT; " in out
    assert (
        "micro-batch of 32" in out and "it fits into the 64.0GB of H100 SXM" in out and "--train.sharding fsdp" in out
    )
    assert "--train.sharding fsdp" not in page(
        ROOT / "configs/gpt2_124m.toml", "--plan=8xh100", "--train.sharding=fsdp"
    )
    seconds = number(r"  a step +([\d.]+)T\n", out) * 1e12 / (8 * 0.4 * 989e12)
    assert number(r"  a step +([\d.e-]+) s:", out) == pytest.approx(seconds, rel=0.01)
    if not torch.cuda.is_available():  # a step would take minutes
        assert "assuming an MFU" in page(ROOT / "configs/gpt2_124m.toml", "--plan")


def test_folder_that_a_built_in_corpus_hides_is_named(folder: Path) -> None:
    (folder / "stories").mkdir()
    first = page(*TINY, "--plan").splitlines()[0]
    assert first == "stories is a built-in corpus; for your own text of that name: --data.source ./stories"
    assert "built-in" not in page(*TINY, "--plan", "--data.source=repeats")


def test_what_would_fit_is_named(folder: Path) -> None:
    options = (*TINY, "--plan=t4", "--train.batch_size=64", "--model.attention=eager", "--model.context=16384")
    rows = int(number(r"it would with --train.micro_batch_size (\d+);", page(*options)))
    assert "it fits" in page(*options, f"--train.micro_batch_size={rows}")
    assert "DOES NOT FIT" in page(*options, f"--train.micro_batch_size={rows + 1}")
    assert "not even a micro-batch of 1 fits" in page(*options, "--model.context=100000")


@pytest.mark.parametrize(
    ("dtype", "shown", "peak"), [("auto", "fp16", "65.0T"), ("fp32", "fp32", "8.10T"), ("bf16", "bf16", "8.10T")]
)
def test_gpus_without_bf16_use_fp16(folder: Path, dtype: str, shown: str, peak: str) -> None:
    text = page(*TINY, "--plan=t4", f"--train.dtype={dtype}")
    assert f"1 x T4, {shown}," in text and f"of {peak}FLOP/s" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*TINY, "--plan", "3xh100"), "train.batch_size is 4; it must be a multiple of the 3 processes"),
        (("--plan", "8xh10"), "known: a100, "),
        (("--plan", "0x\x1b[31m"), "does not know GPU '0x\\x1b[31m'"),
        (("--plan", "--train.minutes=2"), "--plan needs --train.steps"),
    ],
)
def test_mistakes_are_reported_in_a_line(folder: Path, argv: tuple[str, ...], message: str) -> None:
    assert message in error_line(script("train.py", *argv), 2)
    assert not list(folder.iterdir())
