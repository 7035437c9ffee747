"""The processor of a world's small LLaVA."""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def make_processor(tokenizer: Any, template: str, side: int, patch: int) -> LlavaProcessor:
    """CLIP's own preprocessing for pictures of side × side pixels, in patches of patch × patch, and the tokenizer."""
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=template,
    )
