"""Direct logit attribution and the logit lens: the parts are the model's own and add up to its logit."""

import copy
from typing import Any

import pytest
import torch

from inspection.attribution import Attribution, direct_logit_attribution, logit_lens
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from tests.inspection.handmade import LEAD, handmade, repeats
from tests.model.helpers import PRESETS, VOCAB, random_model, random_tokens

T = 11
TEXT = random_tokens(1, T)[0]


def part(attribution: Attribution, label: str) -> float:
    return float(attribution.parts[attribution.labels.index(label)])


@pytest.mark.parametrize(("preset", "attention"), list(zip(PRESETS, ATTENTION_IMPLEMENTATIONS, strict=True)))
def test_parts_add_up_to_the_logit(preset: str, attention: AttentionImplementation) -> None:
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


def test_induction_head_writes_the_whole_logit() -> None:
    """The embedding's parts cancel."""
    model, (text,) = handmade(30), repeats(1, 12)
    for position in (14, 20, 23):
        result = direct_logit_attribution(model, torch.tensor(text), position)
        assert result.token == text[position + 1]
        for label, value in zip(result.labels, result.parts.tolist(), strict=True):
            assert value == pytest.approx(LEAD if label == "L1H1" else 0, abs=1e-3), label


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


@pytest.mark.parametrize("arguments", [(TEXT, T), (TEXT, 0, VOCAB), (TEXT[:0],)])
def test_out_of_range_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        direct_logit_attribution(random_model("glass"), *arguments)


def test_ablated_head_has_no_part() -> None:
    model = random_model("gpt2")
    D = model.config.d_head
    with torch.no_grad():
        model.blocks[0].attention.out.weight[:, 2 * D : 3 * D] = 0
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
