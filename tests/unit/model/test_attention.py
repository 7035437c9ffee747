"""What is measured of a GPU's attention before a run relies on it; here with stand-ins that are right or wrong."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from mirage_dist.model.families import attention
from mirage_dist.model.families.attention import Heads

HEADS = Heads(4, 2, 16)


@pytest.fixture(autouse=True)
def _measured_anew(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    yield
    attention.flash_fault.cache_clear()
    attention.gradient_fault.cache_clear()
    assert torch.get_deterministic_debug_mode() == 0


def right(query, key, value, borders, longest):
    return attention.within_borders(query, key, value, borders.diff().tolist())


def across_borders(query, key, value, borders, longest):
    return attention.within_borders(query, key, value, [query.shape[2]])


def first_sequence_only(query, key, value, borders, longest):
    length, rest = int(borders[1]), query.shape[2] - int(borders[1])
    out = right(query, key, value, borders, longest)
    return torch.cat([out[:, :length], torch.zeros_like(out[:, length:])], dim=1) if rest else out


def not_a_number(*arguments):
    return right(*arguments) * torch.nan


def missing(*arguments):
    raise NotImplementedError("no such operation\nin this build")


class Unrepeatable(torch.autograd.Function):
    calls = itertools.count(1)

    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-6 * next(Unrepeatable.calls))


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (right, None),
        (across_borders, "packed sequences differ by"),
        (first_sequence_only, "packed sequences differ by"),
        (not_a_number, "two backward passes differ"),
        (missing, "NotImplementedError: no such operation in this build"),
        (lambda *arguments: Unrepeatable.apply(right(*arguments)), "two backward passes differ"),
    ],
)
def test_only_flash_attention_that_is_right_stands_for_packed_sequences(monkeypatch, kernel, fault):
    monkeypatch.setattr(attention, "flash", kernel)
    measured = attention.flash_fault(HEADS, torch.float32, "cpu")
    assert measured is None if fault is None else measured.startswith(fault)


@pytest.mark.parametrize("heads", [Heads(4, 4, 16), HEADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_on_a_cpu_has_repeatable_gradients(heads, dtype):
    assert attention.gradient_fault(heads, dtype, "cpu") is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (Unrepeatable.apply, "two backward passes differ"),
        (missing, "NotImplementedError: no such operation in this build"),
    ],
)
def test_attention_without_repeatable_gradients_is_named(monkeypatch, change, fault):
    from transformers.integrations import sdpa_attention

    plain = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *a, **k: (change(plain(*a, **k)[0]), None))
    assert attention.gradient_fault(HEADS, torch.float32, "cpu") == fault


def test_deterministic_algorithms_are_required_in_attention_and_its_backward_alone():
    seen = {}

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor, where):
            ctx.where = where
            seen[f"forward {where}"] = torch.get_deterministic_debug_mode()
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            seen[f"backward {ctx.where}"] = torch.get_deterministic_debug_mode()
            return grad, None

    def attend(module, query, key, value, mask):
        return Look.apply(query * key + value, "inside"), None

    leaf = torch.ones(3, requires_grad=True)
    before = Look.apply(leaf, "before")
    out, _ = attention.repeatable(attend, "cpu")(None, before, before * 2, torch.zeros(3), None)
    Look.apply(out, "after").sum().backward()
    assert seen == {
        f"{way} {where}": 2 * (where == "inside")
        for way in ("forward", "backward")
        for where in ("before", "inside", "after")
    }
    assert torch.equal(leaf.grad, torch.full((3,), 4.0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_attention_is_recomputed_within_the_region_of_its_backward(reentrant):
    from torch.utils.checkpoint import checkpoint

    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.get_deterministic_debug_mode())
            return grad

    attend = attention.repeatable(lambda module, q, k, v, mask: (Look.apply(Look.apply(q) * k + v), None), "cpu")
    leaf = torch.ones(3, requires_grad=True)
    checkpoint(lambda x: attend(None, x, x, x, None)[0], leaf, use_reentrant=reentrant).sum().backward()
    assert seen == [2, 2]


def test_a_verdict_is_the_same_where_gradients_are_off(monkeypatch):
    monkeypatch.setattr(attention, "flash", right)
    with torch.no_grad():
        assert attention.flash_fault(HEADS, torch.float32, "cpu") is None
    with torch.inference_mode():
        assert attention.gradient_fault(HEADS, torch.float32, "cpu") is None


@pytest.mark.parametrize("attends", ["by place", "by name"])
def test_attention_is_called_as_families_call_it(attends):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = SimpleNamespace(is_causal=False, training=False)
    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    for function in (sdpa_attention_forward, attention.repeatable(sdpa_attention_forward, "cpu")):
        if attends == "by place":
            out, _ = function(module, *tensors, mask, dropout=0.0, scaling=1.0)
        else:
            out, _ = function(module, *tensors, attention_mask=mask, dropout=0.0, scaling=1.0)
        exact = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=1.0)
        torch.testing.assert_close(out, exact.transpose(1, 2))


def test_heads_of_decoders_without_any_are_the_usual_ones():
    from transformers import AutoConfig, MambaConfig

    assert Heads.of(MambaConfig()) == attention.USUAL
    assert Heads.of(AutoConfig.for_model("qwen3")) == Heads(32, 32, 128)
    assert Heads.of(AutoConfig.for_model("llama", num_key_value_heads=8)) == Heads(32, 8, 128)
    assert Heads.of(AutoConfig.for_model("gemma4").get_text_config()).size > 0
