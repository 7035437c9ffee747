"""InternVL, Idefics3, SmolVLM, Gemma 3, Mllama, Mistral 3, PaliGemma; Llama and Qwen3 for text alone."""

from __future__ import annotations

from typing import Any

from families import templates
from families.parts import CLIP_MEAN, HALF_MEAN, LAYERS, PATCH, PIXELS, SIDE, SQUARE, TEXT, TOWER, WIDTH, Family, chatml
from families.tokenizers import byte_level, sentencepiece

FAMILIES: dict[str, Family] = {}

FAMILIES["internvl"] = Family(
    tokenizer=lambda: chatml(
        context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    ),
    config=lambda ids: {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": ids("<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": {
            **TOWER,
            "model_type": "internvl_vision",
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
            "norm_type": "layer_norm",
            "use_mean_pooling": True,
        },
        "text_config": {**TEXT, "model_type": "qwen2"},
    },
    files={
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
            "size": SQUARE,
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
            **PIXELS,
            **CLIP_MEAN,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "InternVLVideoProcessor",
            "processor_class": "InternVLProcessor",
            "size": SQUARE,
            **PIXELS,
            **CLIP_MEAN,
        },
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    },
    template=templates.INTERNVL,
)

# ------------------------------------------------------------------------------------------ Idefics3 and SmolVLM

_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]


def _idefics(kind: str, ids: Any, **options: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": kind.lower(),
        "image_token_id": ids("<image>"),
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "vision_config": {**TOWER, "model_type": "idefics3" if kind == "Idefics3" else "smolvlm_vision"},
        "text_config": {**TEXT, "model_type": "llama"},
        **options,
    }


def _idefics_files(kind: str) -> dict[str, Any]:
    pictures = {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "size": {"longest_edge": 2 * SIDE},
        "max_image_size": {"longest_edge": SIDE},
        "do_image_splitting": True,
        "do_pad": True,
        **PIXELS,
        **HALF_MEAN,
    }
    own = {"processor_class": f"{kind}Processor", "image_seq_len": 4}
    return {"preprocessor_config.json": pictures, "processor_config.json": own}


FAMILIES["idefics3"] = Family(
    tokenizer=lambda: byte_level(
        [
            *("<|begin_of_text|>", "<|end_of_text|>", "<pad>", "<end_of_utterance>"),
            *("<fake_token_around_image>", "<image>", "<global-img>", *_TILES),
        ],
        bos="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
    ),
    config=lambda ids: _idefics("Idefics3", ids),
    files=_idefics_files("Idefics3"),
    template=templates.IDEFICS3,
    template_file="chat_template.json",
    ends=("<end_of_utterance>", "<|end_of_text|>"),
)
FAMILIES["smolvlm"] = Family(
    tokenizer=lambda: byte_level(
        [
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"),
            *("<fake_token_around_image>", "<image>", "<global-img>", *_TILES),
        ],
        {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
    ),
    config=lambda ids: _idefics("SmolVLM", ids),
    files={
        **_idefics_files("SmolVLM"),
        "video_preprocessor_config.json": {
            "video_processor_type": "SmolVLMVideoProcessor",
            "processor_class": "SmolVLMProcessor",
            "size": {"longest_edge": 2 * SIDE},
            "max_image_size": {"longest_edge": SIDE},
            **PIXELS,
            **HALF_MEAN,
        },
    },
    template=templates.SMOLVLM,
)

# ----------------------------------------------------------------------------------------- Gemma 3 and PaliGemma

_GEMMA_MARKS = ["<pad>", "<eos>", "<bos>", "<unk>"]
_GEMMA_TOKENS = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_GEMMA_TOWER = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}

FAMILIES["gemma3"] = Family(
    tokenizer=lambda: sentencepiece(
        [*_GEMMA_MARKS, "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        bos="<bos>",
        **_GEMMA_TOKENS,
    ),
    config=lambda ids: {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "boi_token_index": ids("<start_of_image>"),
        "eoi_token_index": ids("<end_of_image>"),
        "image_token_index": ids("<image_soft_token>"),
        "vision_config": _GEMMA_TOWER,
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        },
    },
    files={
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "size": SQUARE,
            "image_seq_length": 4,
            **PIXELS,
            **HALF_MEAN,
        },
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    },
    template=templates.GEMMA3,
    template_file="chat_template.json",
    generation={"do_sample": True, "top_k": 64, "top_p": 0.95},
    ends=("<eos>", "<end_of_turn>"),
)
FAMILIES["paligemma"] = Family(
    tokenizer=lambda: sentencepiece(
        [*_GEMMA_MARKS, "<image>"], {"image_token": "<image>"}, bos="<bos>", **_GEMMA_TOKENS
    ),
    config=lambda ids: {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": ids("<image>"),
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
        "vision_config": {**_GEMMA_TOWER, "projection_dim": WIDTH},
        "text_config": {
            **TEXT,
            "model_type": "gemma2",
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 64,
            "num_image_tokens": 16,
        },
    },
    files={
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "size": SQUARE,
            "image_seq_length": 16,
            **PIXELS,
            **HALF_MEAN,
        }
    },
)
# With a template, as labs add one.
FAMILIES["paligemma_templated"] = Family(
    tokenizer=FAMILIES["paligemma"].tokenizer,
    config=FAMILIES["paligemma"].config,
    files=FAMILIES["paligemma"].files,
    template=templates.PALIGEMMA,
)

# ------------------------------------------------------------------------------------------ Mllama and Mistral 3

_LLAMA3_MARKS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
_LLAMA3_TOKENS = {"eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}

FAMILIES["mllama"] = Family(
    tokenizer=lambda: byte_level(
        [*_LLAMA3_MARKS, "<|python_tag|>", "<|image|>"], bos="<|begin_of_text|>", **_LLAMA3_TOKENS
    ),
    config=lambda ids: {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": ids("<|image|>"),
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 64,
            "vision_output_dim": 96,
            "image_size": SIDE,
            "patch_size": PATCH,
            "intermediate_layers_indices": [0, 1],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "max_num_tiles": 4,
        },
        "text_config": {
            **TEXT,
            "model_type": "mllama_text_model",
            "cross_attention_layers": [1, 3],
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default"},
        },
    },
    files={
        "preprocessor_config.json": {
            "image_processor_type": "MllamaImageProcessor",
            "processor_class": "MllamaProcessor",
            "size": SQUARE,
            "max_image_tiles": 4,
            "do_pad": True,
            **PIXELS,
            **HALF_MEAN,
        }
    },
    template=templates.LLAMA_VISION,
    template_file="chat_template.json",
    generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ends=("<|end_of_text|>", "<|eot_id|>"),
)
FAMILIES["mistral3"] = Family(
    tokenizer=lambda: byte_level(
        [
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"),
        ],
        {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        bos="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    ),
    config=lambda ids: {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": ids("[IMG]"),
        "spatial_merge_size": 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": False,
        "vision_feature_layer": -1,
        "vision_config": {**TOWER, "model_type": "pixtral", "image_size": 2 * SIDE, "head_dim": 12},
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
    },
    files={
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessorFast",
            "processor_class": "PixtralProcessor",
            "patch_size": {"height": PATCH, "width": PATCH},
            "size": {"longest_edge": 2 * SIDE},
            **PIXELS,
            **CLIP_MEAN,
        },
        "processor_config.json": {
            "processor_class": "PixtralProcessor",
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
    },
    template=templates.MISTRAL3,
    template_file="chat_template.json",
)

# ------------------------------------------------------------------------------------------------------ text only

FAMILIES["llama_text"] = Family(
    tokenizer=lambda: byte_level(_LLAMA3_MARKS, bos="<|begin_of_text|>", **_LLAMA3_TOKENS),
    config=lambda ids: {
        **TEXT,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
    },
    template=templates.LLAMA_TEXT,
    template_file="tokenizer_config.json",
    generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ends=("<|end_of_text|>", "<|eot_id|>"),
)
FAMILIES["qwen3_text"] = Family(
    tokenizer=lambda: chatml("<think>", "</think>"),
    config=lambda ids: {
        **TEXT,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    template=templates.QWEN3_TEXT,
    template_file="tokenizer_config.json",
    generation={"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ends=("<|im_end|>", "<|endoftext|>"),
)
