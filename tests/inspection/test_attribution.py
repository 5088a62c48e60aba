"""Direct logit attribution and the logit lens: the parts are the model's own and add up to its logit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch

from inspection.ablation import ablate_heads
from inspection.attribution import Attribution, direct_logit_attribution, logit_lens
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from tests.inspection.handmade import LEAD, handmade, repeats
from tests.model.helpers import PRESETS, VOCAB, random_model, random_tokens

T = 11
TEXT = random_tokens(1, T)[0]


def part(attribution: Attribution, label: str) -> float:
    return float(attribution.parts[attribution.labels.index(label)])


def check_sum(preset: str, attention: AttentionImplementation) -> None:
    """Within 1e-4 in fp32, and within 1e-9 in double precision."""
    single = random_model(preset, attention)
    for model, tolerance in ((single, 1e-4), (copy.deepcopy(single).double(), 1e-9)):
        with torch.no_grad():
            logits = model(TEXT[None])[0]
        for position, token in ((0, 3), (4, 60), (-1, 7), (T - 2, 0)):
            result = direct_logit_attribution(model, TEXT, position, token)
            assert abs(result.total - logits[position, token].item()) < tolerance
            assert (result.position, result.token) == (position % T, token)
            assert len(result.parts) == len(set(result.labels))


def check_head_by_its_parameters(preset: str) -> None:
    """Doubling a head's columns of the output matrix in the last layer doubles its part alone."""
    model = random_model(preset).double()
    H, D = model.config.n_heads, model.config.d_head
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.zero_()
        doubled = copy.deepcopy(model)
        doubled.blocks[1].attention.out.weight[:, (H - 2) * D : (H - 1) * D] *= 2
    before, after = (direct_logit_attribution(m, TEXT, 6, 5) for m in (model, doubled))
    scale = part(after, "token embedding") / part(before, "token embedding")  # the final norm's divisor changes
    for head in range(H):
        expected = part(before, f"L1H{head}") * scale * (2 if head == H - 2 else 1)
        assert part(after, f"L1H{head}") == pytest.approx(expected, rel=1e-9)


def check_handmade_model() -> None:
    """The induction head writes the whole logit of the next token; the embedding's parts cancel."""
    model, (text,) = handmade(30), repeats(1, 12)
    for position in (14, 20, 23):
        result = direct_logit_attribution(model, torch.tensor(text), position)
        assert result.token == text[position + 1]
        for label, value in zip(result.labels, result.parts.tolist(), strict=True):
            assert value == pytest.approx(LEAD if label == "L1H1" else 0, abs=1e-3), label


CHECKS: dict[str, Callable[[], None]] = {
    "handmade": check_handmade_model,
    **{f"parameters, {p}": partial(check_head_by_its_parameters, p) for p in PRESETS},
    **{f"sum, {p}, {a}": partial(check_sum, p, a) for p in PRESETS for a in ATTENTION_IMPLEMENTATIONS},
}


@pytest.mark.parametrize("name", CHECKS)
def test_attribution_check(name: str) -> None:
    CHECKS[name]()


def test_every_part_has_a_label() -> None:
    def labels(preset: str) -> list[str]:
        return list(direct_logit_attribution(random_model(preset), TEXT).labels)

    heads = [f"L0H{head}" for head in range(6)]
    assert labels("qwen3")[:9] == ["token embedding", *heads, "L0 MLP", "L1H0"] and labels("qwen3")[-1] == "L1 MLP"
    biased = labels("gpt2")
    assert biased[:2] == ["token embedding", "position embedding"] and biased[-1] == "final norm bias"
    assert biased[6:8] == ["L0 attention bias", "L0 MLP"]


@pytest.mark.parametrize("preset", PRESETS)
def test_logit_lens_ends_with_the_models_logits(preset: str) -> None:
    model = random_model(preset)
    lens = logit_lens(model, TEXT)
    with torch.no_grad():
        assert lens.shape == (3, T, VOCAB) and torch.equal(lens[-1], model(TEXT[None])[0])
        embedded = model.token_embedding(TEXT)
        if model.position_embedding is not None:
            embedded = embedded + model.position_embedding(torch.arange(T))
        torch.testing.assert_close(lens[0], model.lm_head(model.final_norm(embedded)), rtol=0, atol=1e-5)


def test_logit_lens_shows_the_layer_that_answers() -> None:
    (text,) = repeats(1, 12)
    lens = logit_lens(handmade(30), torch.tensor(text))[:, 13:-1]
    right = lens.gather(-1, torch.tensor(text[14:])[None, :, None].expand(3, -1, 1))[..., 0]
    assert right[:2].abs().max() < 1e-3 and (right[2] - LEAD).abs().max() < 1e-3


def test_ablated_head_has_no_part() -> None:
    model = random_model("gpt2")
    with ablate_heads(model, [(0, 2)]):
        result = direct_logit_attribution(model, TEXT)
        assert part(result, "L0H2") == 0 and part(result, "L0H1") != 0
        assert result.total == pytest.approx(model(TEXT[None])[0, -1, result.token].item(), abs=1e-4)


def test_attribution_leaves_the_model_unchanged() -> None:
    model = random_model("gpt2", "sdpa", dropout=0.5).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    first, second = direct_logit_attribution(model, TEXT), direct_logit_attribution(model, TEXT)
    logit_lens(model, TEXT)
    assert torch.equal(first.parts, second.parts) and first.parts.grad_fn is None
    assert [module.training for module in model.modules()] == modes
    assert {block.attention.attention_implementation for block in model.blocks} == {"sdpa"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_out_of_range_arguments_are_refused() -> None:
    model = random_model("glass")
    for arguments in ((TEXT, T), (TEXT, -T - 1), (TEXT, 0, VOCAB), (TEXT, 0, -1), (TEXT[:0],), (TEXT + VOCAB,)):
        with pytest.raises(ValueError):
            direct_logit_attribution(model, *arguments)
    for text in (random_tokens(1, 17)[0], TEXT[:0]):
        with pytest.raises(ValueError, match="takes 1 to 16"):
            logit_lens(model, text)
