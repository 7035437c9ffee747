"""Every parameter of a real class has the right role and name, and a family whose parts are unknown is refused."""

import time
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mirage_dist.model import trainable
from mirage_dist.model.adapters import layers
from mirage_dist.model.families import roles
from mirage_dist.model.families.roles import Parts
from mirage_dist.schema import ConfigError, LoraConfig

TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"num_hidden_layers": 12, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 16, "patch_size": 8}
QWEN: dict[str, Any] = {"depth": 2, "num_heads": 2, "intermediate_size": 24}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def text(**own):
    return {**TEXT, **own}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**TOWER), text_config=hf.LlamaConfig(**TEXT)),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        text_config=text(rope_parameters=ROPE), vision_config={**QWEN, "embed_dim": 16, "hidden_size": 32}
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        text_config=text(rope_parameters=ROPE), vision_config={**QWEN, "hidden_size": 16, "out_hidden_size": 32}
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config=text(head_dim=8),
        vision_config={**QWEN, "hidden_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    ),
    "idefics3": lambda: hf.Idefics3Config(
        text_config={"model_type": "llama", **TEXT}, vision_config=TOWER, scale_factor=2
    ),
    "gemma3": lambda: hf.Gemma3Config(text_config=text(head_dim=8), vision_config=TOWER, mm_tokens_per_image=1),
    "mllama": lambda: hf.MllamaConfig(
        text_config=text(cross_attention_layers=[1, 3], num_hidden_layers=4),
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "attention_heads": 2},
            **{"num_global_layers": 1, "intermediate_layers_indices": [1], "vision_output_dim": 32, "image_size": 16},
            "patch_size": 8,
        },
    ),
    "idefics2": lambda: hf.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT},
        vision_config=TOWER,
        perceiver_config={
            "resampler_n_heads": 2,
            "resampler_depth": 1,
            "resampler_head_dim": 8,
            "hidden_size": 32,
            "num_key_value_heads": 2,
        },
    ),
    "blip-2": lambda: hf.Blip2Config(
        vision_config=TOWER,
        qformer_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 16},
        text_config={"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 2, "vocab_size": 64}
        | {"num_hidden_layers": 2, "word_embed_proj_dim": 32},
    ),
    "idefics": lambda: hf.IdeficsConfig(
        **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {"num_hidden_layers": 2},
        vision_config={"embed_dim": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "video_llava": lambda: hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER), text_config=hf.LlamaConfig(**TEXT)
    ),
    "deepseek_vl_hybrid": lambda: hf.DeepseekVLHybridConfig(text_config=text(), vision_config=TOWER),
    "qwen2_5_omni_thinker": lambda: hf.Qwen2_5OmniThinkerConfig(
        text_config=text(rope_parameters=ROPE, num_hidden_layers=2),
        vision_config={**QWEN, "hidden_size": 16, "out_hidden_size": 32},
        audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
        | {"output_dim": 32},
    ),
    "llama": lambda: hf.LlamaConfig(**TEXT),
    "tied": lambda: hf.Qwen3Config(**TEXT, head_dim=8, tie_word_embeddings=True),
}
# The first parts of the raw names that have a role: what a reader of each family's code would say.
EXPECTED = {
    "llava": {"connector": "model.multi_modal_projector", "vision": "model.vision_tower"},
    "qwen2_vl": {"connector": "model.visual.merger", "vision": "model.visual"},
    "qwen2_5_vl": {"connector": "model.visual.merger", "vision": "model.visual"},
    "qwen3_vl": {"connector": "model.visual.merger|model.visual.deepstack_merger_list", "vision": "model.visual"},
    "idefics3": {"connector": "model.connector", "vision": "model.vision_model", "decoder": "model.text_model"},
    "gemma3": {"connector": "model.multi_modal_projector", "vision": "model.vision_tower"},
    "mllama": {"connector": "model.multi_modal_projector", "vision": "model.vision_model"},
    "idefics2": {"connector": "model.connector", "vision": "model.vision_model", "decoder": "model.text_model"},
    "blip-2": {"connector": "qformer|query_tokens|language_projection", "vision": "vision_model"}
    | {"decoder": "language_model"},
    "idefics": {"decoder": "model", "vision": "model.vision_model"},
    "video_llava": {"connector": "model.multi_modal_projector", "vision": "model.image_tower|model.video_tower"},
    "deepseek_vl_hybrid": {
        "connector": "model.aligner|model.high_res_vision_neck|model.high_res_vision_proj|model.high_res_vision_alpha",
        "vision": "model.vision_model|model.high_res_vision_model",
    },
    "qwen2_5_omni_thinker": {
        "connector": "model.visual.merger",
        "vision": "model.visual",
        "audio": "model.audio_tower",
    },
    "llama": {"decoder": "model"},
    "tied": {"decoder": "model"},
}


def build(config):
    cls = roles.auto_class(config)
    with torch.device("meta"):
        return cls.from_config(config)


@pytest.fixture(scope="module")
def model():
    made = {}
    return lambda name: made.setdefault(name, build(CONFIGS[name]()))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_the_role_that_its_place_in_the_family_gives_it(model, name):
    expected = {"decoder": "model.language_model", "head": "lm_head", **EXPECTED[name]}
    # The longest start of a name decides, since Qwen's connector lies inside its tower.
    starts = {start: role for role, group in expected.items() for start in group.split("|")}
    for parameter, role in Parts(model(name)).role_of.items():
        matching = [start for start in starts if f"{parameter}.".startswith(f"{start}.")]
        assert role == starts[max(matching, key=len)], parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_by_default_neither_pictures_nor_sounds_encoders_train(model, name):
    trained = set(trainable.choose(model(name), None, []))
    parts = Parts(model(name))
    assert {parts.role_of[n] for n in trained} == {r for r in parts.roles if r not in ("vision", "audio")}
    assert {n for n, p in model(name).named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pattern_relative_to_the_decoder_matches_in_every_family(model, name):
    mlp = {"blip-2": "fc1"}.get(name, "mlp.down_proj")
    matches = Parts(model(name)).matching(f"decoder.layers.[01].{mlp}.weight")
    assert len(matches) == 2


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("blip-2", "idefics")])
def test_with_adapters_names_and_matches_are_those_of_the_model_without(name):
    plain, wrapped = build(CONFIGS[name]()), build(CONFIGS[name]())
    wrapped = layers.wrap(wrapped, LoraConfig(rank=2, also_train=["decoder.norm.weight"]))
    mine, its = Parts(plain), Parts(wrapped)
    assert set(its.alias_of.values()) >= set(mine.alias_of.values())
    for pattern in ("decoder", "*down_proj.weight", "decoder.layers.0.*.weight", "model.*"):
        own = {mine.alias_of[n] for n in mine.matching(pattern)}
        assert own
        assert own == {its.alias_of[n] for n in its.matching(pattern) if ".lora_" not in n}
    adapted = {its.alias_of[n].split(".lora_")[0] for n, p in wrapped.named_parameters() if ".lora_" in n}
    linear = {n.removesuffix(".weight") for n in mine.alias_of.values() if n.startswith("decoder") and "proj" in n}
    assert adapted == {n for n in linear if not n.endswith((".bias", "norm"))}
    trained = {its.alias_of[n] for n, p in wrapped.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert trained == {"decoder.norm.weight"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: hf.FuyuConfig(**text(num_hidden_layers=1, num_key_value_heads=4)), r"no vision tower .*Fuyu"),
        (lambda: hf.Gemma4Config(text_config=text(num_hidden_layers=1, head_dim=8)), r"no vision tower .*Gemma4"),
        (lambda: hf.Florence2Config(), "florence2 is an encoder-decoder"),
        (lambda: hf.CLIPConfig(), "clip is neither"),
    ],
    ids=["fuyu", "gemma4", "florence2", "clip"],
)
def test_a_family_whose_parts_cannot_be_found_is_refused_by_name(config, words):
    with pytest.raises(ConfigError, match=words):
        Parts(build(config()))


def test_a_text_encoder_inside_a_model_is_refused_not_called_a_connector(model):
    strange = build(CONFIGS["llava"]())
    strange.model.reader = hf.BertModel(hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ConfigError, match=r"model\.reader \(BertModel\).* is neither its decoder nor"):
        Parts(strange)


def test_text_models_that_transformers_lists_among_those_of_pictures_are_text_models():
    assert roles.auto_class(hf.LlamaConfig()) is AutoModelForCausalLM
    assert roles.auto_class(hf.Gemma3Config()) is AutoModelForImageTextToText


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*multi_modal_projctor*", "multi_modal_projector"),
        ("decoder.layer.[567].mlp.down_proj.weight", "decoder.layers.0.mlp.down_proj.weight"),
        ("*q_porj*", "q_proj"),
        ("connectr", "connector"),
        ("model.language_model.layers.*.mlp.up_prj.weight", "mlp.up_proj.weight"),
    ],
)
def test_a_pattern_without_a_match_names_what_it_resembles(model, pattern, near):
    parts = Parts(model("llava"))
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        trainable.choose(model("llava"), [pattern], [])
    assert time.perf_counter() - began < 1
    assert near in str(caught.value).split("nearest names: ")[1]
    assert str(caught.value).count(",") < 8
    assert "roles here: decoder, head, connector, vision;" in str(caught.value)
    assert parts.matching(pattern) == []


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["decoder"], 12 * 7), (["decoder.*.q_proj"], 12), (["decoder.layers.[01].mlp.*"], 6), (["connector"], 2)],
)
def test_adapters_are_on_the_layers_of_a_role_or_pattern(model, targets, count):
    names = layers.chosen(model("llava"), Parts(model("llava")), targets)
    assert len(names) == count
    assert "lm_head" not in names


def test_experts_that_adapters_cannot_wrap_are_named(caplog):
    experts = build(hf.Qwen3MoeConfig(**text(num_hidden_layers=1, head_dim=8, num_experts=4, moe_intermediate_size=8)))
    parts = Parts(experts)
    with caplog.at_level("WARNING", "mirage_dist"):
        names = layers.chosen(experts, parts, ["decoder"])
    assert {n.rsplit(".", 1)[-1] for n in names} >= {"q_proj", "o_proj"}
    assert "2 stacks of experts of the decoder have no adapters" in caplog.text
    with pytest.raises(ConfigError, match=r"adapters cannot wrap decoder\.layers\.0\.mlp\.experts\.gate_up_proj"):
        layers.chosen(experts, parts, ["decoder.layers.*.mlp.experts"])


def test_what_trains_is_one_line_by_role(model):
    trainable.choose(model("llava"), None, [])
    count = {
        role: sum(p.numel() for n, p in model("llava").named_parameters() if part in n)
        for role, part in (("connector", "projector"), ("vision", "vision_tower"))
    }
    line = trainable.summary(model("llava"))
    assert line.startswith("trains: decoder ")
    assert "\n" not in line
    assert f"connector {count['connector'] / 1000:.1f} k, vision 0 of {count['vision'] / 1000:.1f} k" in line
    wrapped = layers.wrap(build(CONFIGS["llava"]()), LoraConfig(rank=2))
    adapters = sum(p.numel() for n, p in wrapped.named_parameters() if ".lora_" in n)
    assert isinstance(wrapped, peft.PeftModel)
    assert trainable.summary(wrapped).startswith(f"trains: adapters {adapters / 1000:.0f} k on decoder, decoder 0 of ")
