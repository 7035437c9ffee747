"""Attention on a GPU: packed sequences each by itself against float64, gradients of the same bits, no host waits."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mirage_dist.data.encoding.packing import borders
from mirage_dist.model.families import attention, packing
from mirage_dist.model.families.attention import Heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = (700, 1, 333, 1500, 64)
TOKENS, HEADS, SIZE = sum(LENGTHS), 8, 64


def packed_row(kv_heads, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, TOKENS, SIZE) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    tensors = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    edges = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3], edges


def with_gradients(function, tensors, upstream):
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype).transpose(1, 2))


def one_by_one(query, key, value):
    parts = zip(*(tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)), strict=True)
    outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(outs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_packed_sequences_by_flash_attention_are_those_alone_and_repeatable(kv_heads):
    tensors, upstream, edges = packed_row(kv_heads)

    def run():
        return with_gradients(lambda *t: attention.flash(*t, edges, max(LENGTHS)), tensors, upstream)

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = with_gradients(one_by_one, [t.detach().double().requires_grad_() for t in tensors], upstream)
    for mine, theirs in zip(first, exact, strict=True):
        assert (mine.double() - theirs).norm() < 5e-3 * theirs.norm()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("heads", [(32, 32, 128), (28, 4, 128), (9, 3, 64), (4, 4, 8)])
def test_this_gpu_has_what_a_run_relies_on(heads):
    assert attention.flash_fault(Heads(*heads), torch.bfloat16) is None
    assert attention.gradient_fault(Heads(*heads), torch.bfloat16) is None
    assert attention.gradient_fault(Heads(*heads), torch.float32) is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_sdpa_have_the_same_bits_every_time(masked, dtype):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tensors, upstream, _ = packed_row(HEADS, dtype)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cuda").tril()[None, None] if masked else None
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)

    def run(attend):
        return with_gradients(lambda *t: attend(module, *t, mask, is_causal=not masked)[0], tensors, upstream)

    repeatable = attention.repeatable(sdpa_attention_forward)
    plain, first, *others = run(sdpa_attention_forward), *(run(repeatable) for _ in range(6))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for mine, theirs in zip(first, plain, strict=True):  # of another kernel, on some GPUs
        assert (mine.double() - theirs.double()).norm() < 5e-3 * theirs.double().norm()
    assert torch.get_deterministic_debug_mode() == 0


def test_a_tower_that_names_its_arguments_trains():
    """Qwen2-VL's: transformers calls the attention of some families by keywords alone."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    attention.make_repeatable()
    sizes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1, "num_heads": 2, "patch_size": 4}
    tower = Qwen2VisionTransformerPretrainedModel._from_config(Qwen2VLVisionConfig(**sizes), attn_implementation="sdpa")
    tower = tower.to("cuda", torch.bfloat16)
    grid = torch.tensor([[1, 4, 6], [1, 4, 4]], device="cuda")
    pixels = torch.randn(40, 3 * 2 * 4 * 4, device="cuda", dtype=torch.bfloat16)

    def run():
        tower.zero_grad()
        tower(pixels, grid_thw=grid).last_hidden_state.float().square().sum().backward()
        return [p.grad.clone() for p in tower.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_packed_row_of_a_model_needs_no_mask_and_no_wait(kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 500}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=kv_heads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    ids = torch.randint(500, (1, TOKENS), device="cuda")
    alone = torch.cat([model.model(part).last_hidden_state for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert packing.attend_apart(model.model)
    edges = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    inputs = {"input_ids": ids, **{n: v.cuda() if torch.is_tensor(v) else v for n, v in borders(edges).items()}}

    def run():
        with packing.entering(model.model, inputs) as arguments:
            return model.model(**arguments, use_cache=False).last_hidden_state

    run()  # compiles nothing, but fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run()
        out.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (out - alone).float().norm() < 2e-2 * alone.float().norm()
