"""Packed rows of models that place pictures in three dimensions, and of others: each as if it were alone.

Models are the real classes, tiny; pictures are of two sizes. `by borders` stands for flash-attention (see
`families.packing`).
"""

import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Glm4vConfig,
    InternVLConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)

from mirage_dist.data.encoding.packing import borders, pack
from mirage_dist.model import activations
from mirage_dist.model.families import attention, packing, roles
from mirage_dist.model.policy import HeadedModel, Request

PICTURE = 9
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"num_hidden_layers": 3, "vocab_size": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TOWER = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MARKS = {"image_token_id": PICTURE, "video_token_id": 8, "vision_start_token_id": 6, "vision_end_token_id": 7}
MARKS |= {"image_start_token_id": 6, "image_end_token_id": 7}


@pytest.fixture(autouse=True)
def _softmax_in_float64(monkeypatch):
    """The eager path would take its softmax in float32, whose rounding hides what packing might change."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))


def rope(**more):
    return {**TEXT, "rope_parameters": {**ROPE, **more}}


PLACED = {
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config=rope(), vision_config={**TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1}, **MARKS
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=rope(), vision_config={**TOWER, "fullatt_block_indexes": [1], "window_size": 16}, **MARKS
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={**rope(mrope_interleaved=True), "head_dim": 8},
        vision_config={**TOWER, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        **MARKS,
    ),
    "glm4v": lambda: Glm4vConfig(text_config=rope(), vision_config={**TOWER, "image_size": 32}, **MARKS),
}
GRIDS = ([1, 4, 6], [1, 4, 4], [1, 8, 4])
PIXELS = 3 * 2 * 4 * 4  # channels, frames, rows, columns of a patch


@pytest.fixture(scope="module", params=PLACED)
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        hf = AutoModelForImageTextToText.from_config(PLACED[request.param]())
        for name, p in hf.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(p, std=0.2)  # wide enough for a position to count
    return HeadedModel(hf.double())


def row(before: list[int], after: list[int], grid: list[int] | None = None) -> tuple[dict, dict]:
    """Tokens, and the inputs for a picture."""
    count = 0 if grid is None else grid[0] * grid[1] * grid[2] // 4
    ids = [*before, *([6] if count and before else []), *[PICTURE] * count, *([7] if count and before else []), *after]
    types = [int(i == PICTURE) for i in ids]
    if grid is None:
        return {"input_ids": ids, "mm_token_type_ids": types}, {}
    generator = torch.Generator().manual_seed(sum(grid))
    pixels = torch.randn(grid[1] * grid[2], PIXELS, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "mm_token_type_ids": types}, {"pixel_values": pixels, "image_grid_thw": [grid]}


ROWS = {
    "mixed": [row([11, 12], [13, 14, 15], GRIDS[0]), row([16, 17, 18], [19]), row([20], [21, 22], GRIDS[1])],
    "text, and the placeholder": [row([11, 12], [13]), row([14], [15, 16, 17]), row([], [], GRIDS[1])],
    "pictures of three sizes": [row([10 + i], [20 + i, 30 + i], grid) for i, grid in enumerate(GRIDS)],
}


def inputs(rows, apart=True):
    tensors, edges = pack([tokens for tokens, _ in rows])
    pictures = [picture for _, picture in rows if picture]
    if pictures:
        tensors["pixel_values"] = torch.cat([p["pixel_values"] for p in pictures])
        tensors["image_grid_thw"] = torch.tensor([p["image_grid_thw"][0] for p in pictures])
    return {**tensors, **(borders(edges) if apart else {})}


def passes(model, batches):
    """Log-probabilities of every token but the first of each row, the tapped layer, and gradients of both."""
    model.zero_grad()
    logps, taps = [], []
    for batch, skipped in batches:
        ids = batch["input_ids"][0]
        index_N = torch.tensor([i for i in range(len(ids) - 1) if i + 1 not in skipped])
        out = model(batch, Request(index_N, ids[index_N + 1], layers=(1,)))
        logps.append(out.logp_N)
        taps.append(out.activations_BSD[1][0])
    logp_N, tap_TD = torch.cat(logps), torch.cat(taps)
    (logp_N @ torch.linspace(0.5, 1, len(logp_N), dtype=logp_N.dtype) + tap_TD.square().sum()).backward()
    return logp_N.detach(), tap_TD.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "by borders", "sdpa, checkpointed"])
@pytest.mark.parametrize("rows", ROWS)
def test_packed_sequences_are_those_alone(model, rows, attention):
    """Alone, a row goes through the model's own forward without any argument that packing adds."""
    packing.fault(LlamaConfig(**TEXT), {"input_ids": []}, {}, flash=True)  # registers the attention by borders
    alone = passes(model, [(inputs([one], apart=False), ()) for one in ROWS[rows]])
    text = roles.decoder(model.backbone)
    text.config._attn_implementation = {"by borders": packing.BY_BORDERS}.get(attention, attention.split(",")[0])
    if "checkpointed" in attention:
        model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    try:
        batch = inputs(ROWS[rows])
        packed = passes(model, [(batch, batch["cu_seq_lens_q"].tolist())])
    finally:
        text.config._attn_implementation = "sdpa"
        model.hf.gradient_checkpointing_disable()
        model.eval()
    # GLM's tower interpolates its positions in float32.
    exact = 1e-5 if model.base.config.model_type == "glm4v" else 1e-8
    torch.testing.assert_close(packed, alone, rtol=0, atol=exact)


# ---------------------------------------------------------------------------------- which models can be packed

CONVOLUTION = Lfm2Config(**TEXT, layer_types=["conv", "full_attention", "full_attention"])
CROSS = {**TEXT, "bos_token_id": 0, "cross_attention_layers": [1]}
CROSS["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
TEXTS = {
    "llama": lambda: LlamaConfig(**TEXT),
    "llama with two end tokens": lambda: LlamaConfig(**{**TEXT, "eos_token_id": [1, 2]}),
    "qwen3": lambda: Qwen3Config(**{**TEXT, "num_hidden_layers": 40}, head_dim=8),
}
PICTURED = {
    **PLACED,
    "llava": lambda: LlavaConfig(vision_config=CLIP, text_config=LlamaConfig(**TEXT), image_token_id=PICTURE),
    "llava, a picture token beyond the vocabulary": lambda: LlavaConfig(
        vision_config=CLIP, text_config=LlamaConfig(**{**TEXT, "vocab_size": PICTURE}), image_token_id=PICTURE
    ),
    "internvl": lambda: InternVLConfig(vision_config=CLIP, text_config=Qwen3Config(**TEXT), image_token_id=PICTURE),
}
REFUSED = {
    "a state that passes from token to token": (
        lambda: LlavaConfig(vision_config=CLIP, text_config=CONVOLUTION),
        r"llava has layers that pass on more than attention does \(conv\)",
    ),
    "pictures read by layers of their own": (
        lambda: MllamaConfig(text_config=CROSS, image_token_index=PICTURE),
        r"mllama reads pictures in other ways than as tokens \(layer 1",
    ),
}


def gemma3():
    return Gemma3Config(vision_config=CLIP, text_config={**TEXT, "head_dim": 8}, image_token_id=PICTURE)


# It sees pictures in both directions. Until 5.22 of transformers its masks keep packed sequences apart all the same.
if Version(transformers.__version__) >= Version("5.23"):
    REFUSED["pictures seen in both directions"] = (gemma3, "gemma3 does not keep packed sequences apart")
else:
    PICTURED["gemma3"] = gemma3


def fault(config, flash=False):
    """By the configuration alone, which stays as it is."""
    before = config.to_dict()
    tokens = {"input_ids": [PICTURE] * 4, "token_type_ids": [1] * 4, "mm_token_type_ids": [1] * 4}
    if roles.text_only(config):
        return packing.fault(config, {"input_ids": []}, {}, flash)
    if config.model_type not in PLACED:
        del tokens["mm_token_type_ids"]
    if config.model_type != "gemma3":
        del tokens["token_type_ids"]
    placed = {"image_grid_thw": torch.tensor([[1, 4, 4]])} if "mm_token_type_ids" in tokens else {}
    reason = packing.fault(config, tokens, {"pixel_values": torch.zeros(1), **placed}, flash)
    assert config.to_dict() == before
    return reason


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", [*TEXTS, *PICTURED])
def test_models_that_keep_sequences_apart_are_known_by_measurement(name, flash):
    assert fault({**TEXTS, **PICTURED}[name](), flash) is None


@pytest.mark.parametrize("name", [*TEXTS, *PICTURED])
def test_attention_that_keeps_to_the_borders_is_given_no_mask(monkeypatch, name):
    """As on a GPU; the attention itself is the CPU's."""
    from transformers import masking_utils

    def refused(*_, **given):
        raise AssertionError("a mask is made")

    config = {**TEXTS, **PICTURED}[name]()
    attends = []
    attend = attention.within_borders
    monkeypatch.setattr(attention, "within_borders", lambda *a, **k: attends.append(name) or attend(*a, **k))
    monkeypatch.setattr(masking_utils, "sdpa_mask", refused)  # of `attend_apart`; sdpa's own is registered already
    plain = activations.plain(config.get_text_config())
    assert (fault(config) is None) == (not plain)
    monkeypatch.setattr(packing, "by_flash", lambda *_: True)
    assert fault(config) is None
    assert bool(attends) == plain


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_with_the_reason(name):
    config, words = REFUSED[name]
    assert (reason := fault(config())) is not None
    assert re.match(words, reason)


def test_a_decoder_that_ignores_the_positions_of_sequences_is_noticed(monkeypatch):
    from transformers.models.llama import modeling_llama

    mask = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **given: mask(**{**given, "position_ids": None}))
    assert "does not keep packed sequences apart" in fault(TEXTS["llama"]())


def test_a_model_whose_code_fails_is_not_packed(monkeypatch):
    monkeypatch.setattr("transformers.LlamaModel.forward", lambda *_, **__: {}["rows"])
    assert fault(TEXTS["llama"]()) == "llama could not be measured (KeyError: 'rows')"
