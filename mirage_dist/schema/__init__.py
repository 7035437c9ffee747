"""What a recipe may say: frozen dataclasses with their defaults, allowed values and ranges. `config` fills them.

Imports nothing heavy, and nothing of ours.
"""

from __future__ import annotations

from mirage_dist.schema.chat import ChatConfig, EndpointConfig, PriceConfig
from mirage_dist.schema.choice import Choice
from mirage_dist.schema.data import DataConfig, DiversifyConfig, PrepareRecipe, RunConfig, SourceConfig, WorldConfig
from mirage_dist.schema.errors import ConfigError, RunError
from mirage_dist.schema.evaluation import (
    EvalModelConfig,
    EvalRecipe,
    EvalSetConfig,
    GenerationConfig,
    TemplateConfig,
)
from mirage_dist.schema.training import (
    GroupConfig,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    TrainConfig,
    TrainRecipe,
    check_form,
)

__all__ = [
    "ChatConfig",
    "Choice",
    "ConfigError",
    "DataConfig",
    "DiversifyConfig",
    "EndpointConfig",
    "EvalModelConfig",
    "EvalRecipe",
    "EvalSetConfig",
    "GenerationConfig",
    "GroupConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "PrepareRecipe",
    "PriceConfig",
    "RunConfig",
    "RunError",
    "SourceConfig",
    "TemplateConfig",
    "TrainConfig",
    "TrainRecipe",
    "WorldConfig",
    "check_form",
]
