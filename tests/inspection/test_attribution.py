"""Attribution promises: the parts are the model's own, and they add up to its logit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from inspection import attribution
from inspection.ablation import without
from inspection.attribution import direct_logit_attribution, logit_lens
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from model.gpt import GPT
from tests.inspection.handmade import LEAD, handmade, repeats
from tests.model.helpers import PRESETS, VOCAB, random_model, random_tokens

Patch = pytest.MonkeyPatch
T = 11
TEXT = random_tokens(1, T)[0]


def check_the_parts_are_the_logit(preset: str, attention: AttentionImplementation) -> None:
    """Within 1e-4 in fp32; within 1e-9 where the model computes in fp64."""
    single = random_model(preset, attention)
    for model, within in ((single, 1e-4), (copy.deepcopy(single).double(), 1e-9)):
        with torch.no_grad():
            logits = model(TEXT[None])[0]
        for position, token in ((0, 3), (4, 60), (-1, 7), (T - 2, 0)):
            found = direct_logit_attribution(model, TEXT, position, token)
            assert abs(found.total - logits[position, token].item()) < within
            assert (found.position, found.token) == (position % T, token)
            assert found.parts.dtype == logits.dtype and len(found.parts) == len(set(found.labels))


def check_a_head_by_its_weights(preset: str) -> None:
    """With the heads' columns of the output matrix doubled, a share of the last layer doubles: a part is its own."""
    model = random_model(preset).double()
    before = direct_logit_attribution(model, TEXT, 6, 5)
    H, D = model.config.n_heads, model.config.d_head
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.blocks[1].attention.out.weight[:, (H - 2) * D : (H - 1) * D] *= 2
        doubled.blocks[1].mlp.down.weight.zero_()
        model.blocks[1].mlp.down.weight.zero_()
    before, after = (direct_logit_attribution(one, TEXT, 6, 5) for one in (model, doubled))
    # The last norm divides by something else afterwards: what did not change tells by how much.
    scale = after.part("token embedding") / before.part("token embedding")
    for head in range(H):
        wanted = before.part(f"L1H{head}") * scale * (2 if head == H - 2 else 1)
        assert after.part(f"L1H{head}") == pytest.approx(wanted, rel=1e-9)


def check_the_model_built_by_hand() -> None:
    """The induction head writes what comes next, all of it; the token's embedding and its mirror cancel."""
    model, (text,) = handmade(30), repeats(1, 12)
    for position in (14, 20, 23):
        found = direct_logit_attribution(model, torch.tensor(text), position)
        assert found.token == text[position + 1]
        for label, part in zip(found.labels, found.parts.tolist(), strict=True):
            assert part == pytest.approx(LEAD if label == "L1H1" else 0, abs=1e-3), label


CHECKS: dict[str, Callable[[], None]] = {
    "by hand": check_the_model_built_by_hand,
    **{f"weights, {p}": partial(check_a_head_by_its_weights, p) for p in PRESETS},
    **{
        f"sum, {p}, {f}": partial(check_the_parts_are_the_logit, p, f)
        for p in PRESETS
        for f in ATTENTION_IMPLEMENTATIONS
    },
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name]()


def reading(change: Callable[[GPT, Tensor, Tensor, Any], tuple[Tensor, Any]]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        real = attribution._reading
        patch.setattr(attribution, "_reading", lambda model, x, token: change(model, x, *real(model, x, token)))

    return apply


def running(change: Callable[[attribution.Layer], attribution.Layer]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        real = attribution._run
        patch.setattr(attribution, "_run", lambda *args: change(real(*args)))

    return apply


def other_heads(layer: attribution.Layer) -> attribution.Layer:
    """A stretch of the heads' outputs out of its place, as if heads were counted from 1."""
    rolled = layer.heads.roll(1, dims=-1)
    return attribution.Layer(layer.before, rolled, layer.mlp, layer.after)


def mlp_with_attention(layer: attribution.Layer) -> attribution.Layer:
    return attribution.Layer(layer.before, layer.heads, layer.after - layer.before, layer.after)


def uncentred(model: GPT, x: Tensor, token: int) -> tuple[Tensor, Tensor | None]:
    norm, column = model.final_norm, model.lm_head.weight[token]
    scale = torch.rsqrt(x.var(correction=0) + norm.eps)
    return column * norm.weight * scale, None if norm.bias is None else norm.bias @ column


MUTANTS: dict[str, tuple[Callable[[Patch], None], list[str]]] = {
    "the mean stays": (
        lambda patch: patch.setattr(attribution, "_reading", uncentred),
        ["sum, glass, eager", "sum, gpt2, sdpa"],
    ),
    "the scale is forgotten": (
        reading(lambda model, x, reader, shift: (reader * x.std(), shift)),
        ["sum, glass, eager", "sum, qwen3, eager", "sum, gpt2, sdpa"],
    ),
    "the norm's shift is forgotten": (
        reading(lambda model, x, reader, shift: (reader, None)),
        ["sum, gpt2, eager", "sum, gpt2, sdpa"],
    ),
    "heads are out of place": (running(other_heads), ["sum, glass, sdpa", "sum, qwen3, eager"]),
    "attention counts twice": (running(mlp_with_attention), ["sum, glass, sdpa", "sum, qwen3, eager"]),
}
CASES = [(name, check) for name, (_, watchers) in MUTANTS.items() for check in watchers]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_a_broken_attribution_is_noticed(name: str, check: str, monkeypatch: Patch) -> None:
    MUTANTS[name][0](monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[check]()


def test_every_writer_has_a_label() -> None:
    def labels(preset: str) -> list[str]:
        return list(direct_logit_attribution(random_model(preset), TEXT).labels)

    heads = [f"L0H{head}" for head in range(6)]
    assert labels("qwen3")[:9] == ["token embedding", *heads, "L0 MLP", "L1H0"] and labels("qwen3")[-1] == "L1 MLP"
    biased = labels("gpt2")
    assert biased[:2] == ["token embedding", "position embedding"] and biased[-1] == "final shift"
    assert biased[6:8] == ["L0 attention bias", "L0 MLP"]


def test_the_likeliest_token_is_taken() -> None:
    model = random_model("glass")
    with torch.no_grad():
        assert direct_logit_attribution(model, TEXT).token == int(model(TEXT[None])[0, -1].argmax())


def test_what_comes_later_plays_no_part() -> None:
    model = random_model("qwen3").double()
    whole, cut = direct_logit_attribution(model, TEXT, 4, 9), direct_logit_attribution(model, TEXT[:5], -1, 9)
    torch.testing.assert_close(whole.parts, cut.parts, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_last_row_of_the_lens_is_the_model(preset: str, attention: AttentionImplementation) -> None:
    model = random_model(preset, attention)
    lens = logit_lens(model, TEXT)
    with torch.no_grad():
        assert lens.shape == (3, T, VOCAB) and torch.equal(lens[-1], model(TEXT[None])[0])
        embedded = model.token_embedding(TEXT)
        if model.position_embedding is not None:
            embedded = embedded + model.position_embedding(torch.arange(T))
        torch.testing.assert_close(lens[0], model.lm_head(model.final_norm(embedded)), rtol=0, atol=1e-5)
    assert not torch.equal(lens[0], lens[1]) and not torch.equal(lens[1], lens[2])


def test_the_lens_shows_in_which_layer_the_answer_comes() -> None:
    (text,) = repeats(1, 12)
    lens = logit_lens(handmade(30), torch.tensor(text))[:, 13:-1]
    right = lens.gather(-1, torch.tensor(text[14:])[None, :, None].expand(3, -1, 1))[..., 0]
    assert right[:2].abs().max() < 1e-3 and (right[2] - LEAD).abs().max() < 1e-3


def test_a_head_that_is_taken_away_writes_nothing() -> None:
    model = random_model("gpt2")
    with without(model, [(0, 2)]):
        found = direct_logit_attribution(model, TEXT)
        assert found.part("L0H2") == 0 and found.part("L0H1") != 0
        assert found.total == pytest.approx(model(TEXT[None])[0, -1, found.token].item(), abs=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = random_model("gpt2", dropout=0.5).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    first, again = direct_logit_attribution(model, TEXT), direct_logit_attribution(model, TEXT)
    logit_lens(model, TEXT)
    assert torch.equal(first.parts, again.parts)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert first.parts.grad_fn is None


def test_what_is_out_of_range_is_refused() -> None:
    model = random_model("glass")
    for arguments in ((TEXT, T), (TEXT, -T - 1), (TEXT, 0, VOCAB), (TEXT, 0, -1), (TEXT[:0],), (TEXT + VOCAB,)):
        with pytest.raises(ValueError):
            direct_logit_attribution(model, *arguments)
    with pytest.raises(ValueError, match="reads 1 to 16"):
        logit_lens(model, random_tokens(1, 17)[0])
    with pytest.raises(ValueError, match="reads 1 to 16"):
        logit_lens(model, TEXT[:0])
