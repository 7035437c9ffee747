"""`generation.backend: hf`: transformers, for any image-text-to-text or causal language model directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.encoding.conversation import Assessed, Conversation, called, tokenizer_of
from mirage_dist.data.sample import Sample
from mirage_dist.evals.models.base import Generator
from mirage_dist.evals.models.drawing import Drawing
from mirage_dist.evals.models.memory import RowsAtOnce
from mirage_dist.model import weights
from mirage_dist.model.families import by_row, configs, processors, roles
from mirage_dist.model.load import DTYPES
from mirage_dist.ranks import no_bars_in_logs
from mirage_dist.schema import ConfigError, EvalModelConfig, GenerationConfig, TemplateConfig


class HuggingFace(Generator):
    """A model and its processor, on the GPU if there is one. Prompts of a batch are left-padded.

    Raises ConfigError when the directory is no image-text-to-text or causal language model that can be loaded.
    """

    conversation: ClassVar[type[Conversation]] = Conversation
    seeded = True

    def __init__(self, model: EvalModelConfig, template: TemplateConfig, generation: GenerationConfig) -> None:
        super().__init__(model, template, generation)
        no_bars_in_logs()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = Path(self.path)
        config, processor = configs.load(folder), processors.load(folder)
        self.tokenizer = tokenizer_of(processor)
        loaded = weights.load(roles.auto_class(config), folder, config=config, dtype=DTYPES[model.dtype])
        by_row.keep_apart(loaded)
        self.model = loaded.to(self.device).eval()
        self.encoder = encoder(processor, template, config, self.conversation)
        self.options = greedy(loaded.generation_config, self.tokenizer, generation.max_new_tokens)

    def __call__(self, samples: Sequence[Sample]) -> Iterator[list[tuple[int, str]]]:
        """As the base class. A batch that does not fit into memory is halved, and so are all later ones.

        Raises RunError naming the sample when a single one does not fit.
        """
        start = 0
        remedy = "lower generation.max_new_tokens or use a larger GPU"
        rows = RowsAtOnce(self.batch_size, self.device, "generation.batch_size", remedy)
        while start < len(samples):
            batch = range(start, min(start + rows.count, len(samples)))
            part = [samples[i] for i in batch]
            texts = rows.attempt(partial(self.answer, part), len(part), f"{part[0].source}, id {part[0].id!r}")
            if texts is None:
                self.batch_size = rows.count
                continue
            yield list(zip(batch, texts, strict=True))
            start = batch.stop

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The model's keyword arguments for these questions, on its device."""
        return self.placed(self.encoder.prompts(list(samples)))

    def placed(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's tensors on the model's device, floating-point ones in the model's dtype."""
        # Pictures come in float32; integer inputs (ids, masks, grids) keep their type.
        kinds = {name: self.model.dtype if x.is_floating_point() else x.dtype for name, x in inputs.items()}
        return {name: x.to(self.device, kinds[name]) for name, x in inputs.items()}

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample]) -> list[str]:
        """Generation ends as soon as every row of the batch has produced an end token."""
        inputs = self.prompts(samples)
        drawing = LogitsProcessorList([Drawing([sample.draw for sample in samples])])
        sequences = self.model.generate(**inputs, **self.options, logits_processor=drawing)
        new = sequences[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


class Completion(HuggingFace):
    """A model that continues a sample's question as it is, without a chat template: a classifier of texts.

    The tokenizer's start token comes before it unless the text has it. Raises ConfigError for one over max_length.
    """

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        adds_start = self.encoder.tokens.adds_start
        rows = [self.tokenizer(s.question, add_special_tokens=adds_start(s.question))["input_ids"] for s in samples]
        for sample, row in zip(samples, rows, strict=True):
            if len(row) > self.encoder.max_length:
                raise ConfigError(f"{called(sample)}: the text has {len(row)} tokens, over {self.encoder.max_length}")
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids_BS = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return self.placed({"input_ids": ids_BS, "attention_mask": mask_BS})


class Assessment(HuggingFace):
    """A classifier of conversations: its chat template writes instructions around question and answer."""

    conversation = Assessed


def encoder(
    processor: Any, template: TemplateConfig, config: Any, conversation: type[Conversation] = Conversation
) -> Encoder:
    """The encoder of prompts, the same for every engine. config: the model's configuration."""
    return Encoder(
        processor,
        template.max_length,
        "error",
        template.image_aspect,
        template.system_prompt,
        picture_token=roles.picture_token(config),
        template_options=template.template_options,
        conversation=conversation,
    )


def greedy(defaults: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, Any]:
    """Keyword arguments of `generate` for greedy decoding, whatever sampling the model's generation config sets.

    defaults: the model's generation config. Raises ConfigError when neither it nor the tokenizer has an end token.
    """
    # Chat models may end with one of several tokens; only their generation config knows them all.
    eos = defaults.eos_token_id if defaults.eos_token_id is not None else tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the model has no end token: neither generation_config.json nor the tokenizer names one")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    likeliest = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return {**likeliest, "max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": pad}
