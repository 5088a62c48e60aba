"""`train.py --plan`: what it says of parameters, operations and memory is what model, loss and optimizer really do."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training.footprint import Blocks, Footprint, footprint, nothing, stand_in
from training.speed import reckoned

from common.errors import UserError
from data.config import DataConfig
from data.prepare import CorpusInfo, cache_lookup, prepare
from model import chunked_attention as thrift
from model.config import ATTENTION_IMPLEMENTATIONS, ModelConfig
from model.gpt import GPT
from tests.runs import ROOT, TINY, said, script
from training import speed
from training.config import OptimConfig, RunConfig, TrainConfig
from training.device import DistContext
from training.flops import count_parameters, flops_per_token, muon_flops
from training.hardware import GPUS, PlanTarget, parse_plan_option, parse_target
from training.optimizer import Optimizer
from training.plan import SPARED, Plan, duration, scaled, verdict

PRESETS = ("glass", "gpt2", "qwen3")
V, T, B = 61, 24, 3
CPU = torch.device("cpu")
BF16, FP32 = DistContext(CPU, torch.bfloat16), DistContext(CPU, torch.float32)


def shape(preset: str, attention: str = "eager", groups: int = 0, **settings: Any) -> ModelConfig:
    sizes = {"n_layers": 1, "n_heads": 4, "d_model": 32, "context": T, **settings}
    return ModelConfig(preset=preset, attention=attention, n_kv_heads=groups, **sizes)  # type: ignore[arg-type]


def flops(counter: FlopCounterMode, work: Any, *given: Any) -> int:
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the processor's fused kernel
        work(*given)
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_operations_are_those_of_the_model(preset: str, groups: int, attention: str) -> None:
    """To the last product, forward, backward, and in Muon's step."""
    config = shape(preset, attention, groups, d_head=12, d_mlp=40, n_layers=2)
    model, said = GPT(config, V), flops_per_token(config, V)
    tokens = torch.randint(V, (B, T))
    counter, kept = FlopCounterMode(display=False), []
    assert flops(counter, lambda: kept.append(model(tokens))) == said.forward * B * T
    assert flops(FlopCounterMode(display=False), kept[0].sum().backward) == said.backward * B * T
    optimizer = Optimizer(model, OptimConfig())
    assert flops(FlopCounterMode(display=False), optimizer.step) == muon_flops(config)


def test_attentions_share_grows_with_the_context() -> None:
    short, long = (flops_per_token(shape("glass", context=context), V) for context in (32, 64))
    assert long.square == 2 * short.square
    assert long.forward - long.square == short.forward - short.square


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_model(preset: str) -> None:
    parts = count_parameters(shape(preset, groups=2), V)
    model = GPT(shape(preset, groups=2), V)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["MLP"] == sum(p.numel() for block in model.blocks for p in block.mlp.parameters())
    assert parts["embeddings"] == sum(p.numel() for name, p in model.named_parameters() if "embedding" in name)
    assert parts["norms"] == sum(p.numel() for name, p in model.named_parameters() if "norm" in name)


def config_of(model: ModelConfig, optimizer: str = "muon", batch_size: int = B) -> RunConfig:
    return RunConfig(
        model=model,
        optim=OptimConfig(optimizer=optimizer),  # type: ignore[arg-type]
        train=TrainConfig(batch_size=batch_size),
    )


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("preset", "optimizer"), [("glass", "muon"), ("gpt2", "adamw"), ("qwen3", "muon")])
def test_what_stays_in_memory_is_what_a_real_step_leaves(preset: str, optimizer: str) -> None:
    config = config_of(shape(preset), optimizer)
    planned = footprint(config, V, BF16, B)
    trainer = stand_in(config, V, BF16, GPT(config.model, V), B)
    trainer.forward_backward(nothing(B, T, CPU), 1)
    assert planned.weights == bytes_of(trainer.model.parameters())
    assert planned.gradients == bytes_of(p.grad for p in trainer.model.parameters())
    trainer.optimizer.step()
    assert planned.moments == bytes_of(value for _, value in trainer.optimizer.named_state())


def kept_by(model: GPT, ctx: DistContext, rows: int) -> int:
    """Bytes that autograd keeps of everything up to the head, each block of memory once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    blocks: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            blocks[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no other block takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), ctx.autocast():
        model.hidden_states(torch.zeros(rows, model.config.context, dtype=torch.long))
    return sum(blocks.values())


@pytest.mark.parametrize(
    ("machine", "attention", "preset", "groups", "dropout"),
    [
        (BF16, "eager", "glass", 2, 0.0),
        (BF16, "sdpa", "glass", 0, 0.0),
        (FP32, "eager", "gpt2", 0, 0.1),
        (FP32, "sdpa", "gpt2", 4, 0.1),
        (BF16, "sdpa", "qwen3", 1, 0.0),
        (FP32, "eager", "qwen3", 2, 0.0),
        (BF16, "chunked", "glass", 0, 0.1),
        (BF16, "chunked", "gpt2", 0, 0.0),
        (FP32, "chunked", "qwen3", 2, 0.0),
    ],
)
def test_activations_are_what_autograd_keeps(
    ctx: DistContext, attention: str, preset: str, groups: int, dropout: float
) -> None:
    """Within 1% of the bytes that a real forward pass keeps."""
    config = config_of(shape(preset, attention, groups, dropout=dropout))
    planned = footprint(config, V, ctx, B)
    model = GPT(config.model, V)
    head = 2 * V * config.model.d_model if ctx is BF16 else 0  # the head's copy is none of the features
    assert planned.activations + planned.copies - head == pytest.approx(kept_by(model, ctx, B), rel=0.01)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "position" not in name]
    copies = bytes_of(matrices) // 2 if ctx is BF16 else 0  # and, fused, the gains of queries and keys
    assert planned.copies == pytest.approx(copies, rel=0.01)


def test_what_is_computed_again_is_not_counted_but_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(shape("gpt2", "chunked"))
    many = footprint(config, V, BF16, B)
    monkeypatch.setattr(thrift, "KEPT", 0)
    few = footprint(config, V, BF16, B)
    assert few.copies == many.copies
    active, weights = B * T * 4 * 32, B * 4 * T * T  # of the MLP, and of attention; two bytes each
    assert many.activations - few.activations == pytest.approx(2 * (active + weights), abs=2 * 64)


@pytest.mark.parametrize(("machine", "pieces"), [(BF16, 1), (FP32, 2)], ids=["bf16", "fp32 in two"])
def test_the_most_at_once_is_that_of_a_real_step(ctx: DistContext, pieces: int) -> None:
    """The same blocks counted while real memory is used."""
    config = config_of(shape("glass", context=64), batch_size=4 * pieces)
    model = GPT(config.model, 300)
    trainer = stand_in(config, 300, ctx, model, 4, pieces)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    trainer.forward_backward(nothing(4, 64, CPU), 1)
    trainer.optimizer.step()
    with Blocks(weights) as blocks:
        trainer.forward_backward(nothing(4 * pieces, 64, CPU), 1)
        trainer.optimizer.step()
    planned = footprint(config, 300, ctx, 4, pieces)
    assert planned.peak - planned.weights - planned.moments == pytest.approx(blocks.peak, rel=0.02)
    assert planned.loss >= 4 * 64 * 300 * (2 if ctx is BF16 else 4)  # at least the logits


def test_blocks_are_counted_from_their_coming_to_their_going() -> None:
    with Blocks(set()) as blocks:
        one = torch.zeros(100)
        one[:50].add_(1)  # a view is no memory
        two = one + 1
        del one
        torch.ones(25)
    assert (blocks.peak, blocks.now) == (800, 400)
    del two
    assert blocks.now == 0


@pytest.mark.slow
def test_memory_grows_in_a_line_with_the_windows() -> None:
    config = config_of(shape("glass", context=64))
    two, four, six = (footprint(config, 300, BF16, rows) for rows in (2, 4, 6))
    assert six.activations - four.activations == four.activations - two.activations > 0
    assert (two.weights, two.moments) == (six.weights, six.moments)


def test_splitting_leaves_each_its_share() -> None:
    planned = footprint(config_of(shape("gpt2")), V, BF16, 1)
    least = planned.activations + planned.loss + planned.copies + planned.outside + 2 * planned.block
    assert planned.sharded(1000, 2) == pytest.approx(least + planned.gradients, rel=0.01)
    assert planned.sharded(2, 1) > planned.sharded(4, 1) > planned.sharded(1000, 1) >= least


@pytest.mark.parametrize(
    ("argv", "rest", "place"),
    [
        (["--plan"], [], PlanTarget()),
        (["--plan", "--train.steps=5"], ["--train.steps=5"], PlanTarget()),
        (["--plan", "a.toml"], ["a.toml"], PlanTarget()),
        (["a.toml", "--plan", "8xH100", "--run.seed", "2"], ["a.toml", "--run.seed", "2"], PlanTarget(GPUS["h100"], 8)),
        (["a.toml", "--plan=RTX 4090"], ["a.toml"], PlanTarget(GPUS["rtx4090"])),
        (["a.toml"], ["a.toml"], None),
    ],
)
def test_the_option_is_taken_out_of_the_command_line(
    argv: list[str], rest: list[str], place: PlanTarget | None
) -> None:
    assert parse_plan_option(argv) == (rest, place)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("h10", "did you mean h"),
        ("8xa10080", "did you mean a100-80?"),
        ("4090", "rtx4090?"),
        ("m3", "it knows a100-40"),
    ],
)
def test_a_mistyped_gpu_gets_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(hint)):
        parse_target(text)


@pytest.mark.parametrize("text", ["0xh100", "999999xh100", "x", "-3xt4", "\x1b[31m"])
def test_a_number_of_gpus_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_target(text)
    assert "\x1b" not in str(refused.value)


def test_a_mistyped_gpu_is_answered_without_torch() -> None:
    program = "import sys, train; sys.exit(sorted({'torch', 'numpy'} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with no cache anywhere near, where measuring is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    return tmp_path


def page(*argv: object) -> str:
    done = script("train.py", *argv)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_the_page_of_this_machine(clean: Path) -> None:
    out = page("--plan", *TINY)
    assert out.startswith("plan       quickstart on this machine: cpu, ")
    assert "vocabulary of 97 (assumed" in out
    assert "6 steps of 4 x 16 tokens: 384 tokens\n" in out
    total = int(re.search(r"^parameters +([\d,]+)$", out, re.M)[1].replace(",", ""))  # type: ignore[index]
    assert total == sum(p.numel() for p in GPT(shape("glass", n_layers=2, n_heads=2, d_model=16), 97).parameters())
    assert "it fits" in out and "measured here\n" in out
    assert re.search(r"a step +[\d.]+ (ms|s): [\d,]+ tokens/s", out)
    assert not list(clean.iterdir())  # no run folder, no cache


def test_the_page_of_eight_gpus(clean: Path) -> None:
    out = page(ROOT / "configs/gpt2_124m.toml", "--plan", "8xh100", "--model.n_layers=2", "--data.tokenizer=byte")
    assert "8 x H100 SXM, bf16, fused attention" in out
    assert "vocabulary of 257 (256 bytes and end-of-text)" in out
    assert "32 windows at once" in out and "with train.sharding fsdp" in out
    assert "40% (assumed) of 989 TFLOP/s" in out
    assert not list(clean.iterdir())


@pytest.mark.slow
def test_a_gpu_without_bf16_is_planned_in_fp32(clean: Path) -> None:
    assert "T4, fp32, sdpa" in page("--plan", "t4", *TINY)


def test_tokens_and_epochs_of_a_prepared_corpus(clean: Path) -> None:
    (clean / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = (*TINY, f"--data.source={clean / 'fox.txt'}", "--train.steps=56", "--plan=l4")
    assert "not prepared yet" in page(*options)
    prepared = prepare(DataConfig(source=str(clean / "fox.txt"), tokenizer="char"), progress=False)
    before = sorted(clean.rglob("*"))
    windows = -(-(len(prepared.train) - 1) // 16)
    out = page(*options)
    assert f"{len(prepared.train):,} training tokens; vocabulary of {prepared.tokenizer.vocab_size}\n" in out
    assert f", {56 * 4 / windows:.2f} epochs" in out
    assert sorted(clean.rglob("*")) == before


def test_a_large_corpus_is_known_by_its_list_alone(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = clean / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    config = DataConfig(source=str(text), tokenizer="byte")
    prepare(config, progress=False)
    monkeypatch.setattr(found, "QUICKLY_READ", 0)
    assert cache_lookup(config).train is None  # a file this young is on no list
    monkeypatch.setattr("data.prepare._SETTLED_NS", 0)
    prepare(config, progress=False)
    assert cache_lookup(config).train is not None
    text.write_text("another one")
    assert cache_lookup(config).train is None


def test_the_vocabularies_are_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its tables say without fetching: the size itself, or the largest special token."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, loader, lambda *_, **__: {})
    tables = {name: make() for name, make in public.ENCODING_CONSTRUCTORS.items()}
    sizes = {n: t.get("explicit_n_vocab") or max(t["special_tokens"].values()) + 1 for n, t in tables.items()}
    assert {name: sizes[name] for name in found.ENCODINGS} == found.ENCODINGS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--plan", "3xh100"), "train.batch_size is 4, which 3 processes cannot share evenly"),
        (("--plan", "8xh10"), "did you mean h100"),
        (("--plan", "--data.tokenizer=gtp2"), "nearest are: gpt2"),
        (("--plan", "--model.n_layer=3"), "did you mean --model.n_layers"),
    ],
)
def test_mistakes_are_said_in_a_line(clean: Path, argv: tuple[str, ...], message: str) -> None:
    assert message in said(script("train.py", *TINY, *argv), 2)
    assert not list(clean.iterdir())


def test_torchrun_is_refused(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    with pytest.raises(UserError, match="leave torchrun out"):
        import train

        train.main([*TINY, "--plan"])


def planned_for(gpu: str, count: int, model: ModelConfig, batch_size: int) -> Plan:
    config = config_of(model, "adamw", batch_size)
    rows = batch_size // count
    return Plan(config, PlanTarget(GPUS[gpu], count), BF16, CorpusInfo(300, ""), rows)


def advice(one: Plan, limit: float) -> tuple[str, Footprint]:
    memory = one.memory("sdpa", one.rows)
    return verdict(one, memory, limit)[-1], memory


@pytest.mark.slow
def test_the_micro_batch_that_is_named_fits() -> None:
    one = planned_for("t4", 1, shape("gpt2", "sdpa", context=64), 32)
    line, memory = advice(one, limit := one.memory("sdpa", 10).peak)
    assert "it fits" in advice(one, memory.peak)[0]
    rows = int(re.search(r"--train\.micro_batch_size (\d+) would", line)[1])  # type: ignore[index]
    assert 8 <= rows <= 10
    assert one.memory("sdpa", rows).peak <= limit


@pytest.mark.slow
def test_where_no_micro_batch_fits_sharing_is_named() -> None:
    one = planned_for("t4", 4, shape("gpt2", "sdpa", context=16, d_model=64, n_layers=9), 4)
    least = one.memory("sdpa", 1)
    limit = least.sharded(4, 1)
    assert limit < least.peak
    assert "--train.sharding fsdp would" in advice(one, limit)[0]
    assert "of them would" in advice(replace(one, place=PlanTarget(GPUS["t4"]), rows=1), least.sharded(2, 2))[0]
    assert "lower model.context" in advice(one, least.activations)[0]


def test_time_on_a_gpu_follows_the_data_sheet() -> None:
    """Large: its products at the assumed share of the peak; small: the calls, however fast the GPU."""
    large = shape("gpt2", "sdpa", context=256, d_model=1024, n_heads=16)
    config = config_of(large, "adamw", 64)
    memory = Footprint(10, 10, 20, 5, 100, 50, 195, 100, 40, 2, 5)
    once = reckoned(config, 50_257, GPUS["h100"], 1, memory, 1)
    cost = flops_per_token(large, 50_257)
    assert once.step == pytest.approx(64 * 256 * 3 * cost.forward / (0.4 * 989e12), rel=0.01)
    assert reckoned(config, 50_257, GPUS["h100"], 8, memory, 1).step == pytest.approx(once.step / 8, rel=0.01)
    small = config_of(shape("glass"), batch_size=4)
    assert "calls" in (slow := reckoned(small, V, GPUS["b200"], 1, memory, 3)).how
    assert slow.step == pytest.approx(340 * speed.CALL_SECONDS)


def test_a_step_measured_on_a_part_is_scaled_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    config = config_of(shape("glass", context=64, n_layers=1), batch_size=4)
    whole = speed.measured(config, V, FP32, 4)
    monkeypatch.setattr(speed, "product_speed", lambda ctx: 1e6)  # so slow that one window has to do
    part = speed.measured(config, V, FP32, 4)
    assert whole.how == "measured here" and part.how == "measured here on 1 windows"
    assert 0.1 < part.step / whole.step < 10


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 "), (999, "999 "), (1_234_567, "1.23 M"), (12_345, "12.3 k"), (999_600, "1.00 M")]
)
def test_numbers_have_three_digits(number: float, text: str) -> None:
    assert scaled(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0123, "12.3 ms"), (75, "75 s"), (3000, "50 min"), (1e6, "11.6 days")])
def test_times_have_the_unit_of_a_person(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_spared_is_less_than_all() -> None:
    assert 0.5 < SPARED < 1
    with contextlib.suppress(KeyError):
        assert all(gpu.memory > 1e10 and gpu.fp32 > 1e12 for gpu in GPUS.values())
