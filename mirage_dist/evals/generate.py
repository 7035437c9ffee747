"""Answers: greedy, batched, left-padded, from any Hugging Face image-text-to-text model directory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mirage_dist.data.collate import Encoder
from mirage_dist.data.sources import Sample
from mirage_dist.schema import ConfigError, EvalModelConfig, GenerationConfig, TemplateConfig
from mirage_dist.world import no_bars_in_logs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN_LINES = 10  # progress lines where there is no terminal


class Generator:
    """A model and its processor, ready to answer. On the GPU if there is one.

    Raises ConfigError when the directory holds no model that `AutoModelForImageTextToText` can load.
    """

    def __init__(self, model: EvalModelConfig, template: TemplateConfig, generation: GenerationConfig) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        no_bars_in_logs()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            processor: Any = AutoProcessor.from_pretrained(model.path, local_files_only=True)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model.path, dtype=DTYPES[model.dtype], local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={model.path}: cannot be loaded: {error}") from error
        self.tokenizer = processor.tokenizer
        self.model = loaded.to(self.device).eval()
        self.encoder = Encoder(
            processor,
            max_length=template.max_length,
            image_aspect=template.image_aspect,
            system_prompt=template.system_prompt,
        )
        self.batch_size = generation.batch_size
        self.options = _options(loaded.generation_config, self.tokenizer, generation.max_new_tokens)

    def __call__(self, samples: Sequence[Sample], what: str = "answers") -> Iterator[list[tuple[int, str]]]:
        """Answer every sample; yields each batch, as it is done, as (index into `samples`, answer) pairs.

        The longest questions come first: rows of like length waste little padding, and a batch that does not
        fit into memory fails at the start.
        """
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i].question))
        with Progress(len(samples), what) as progress:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                yield list(zip(batch, self.answer([samples[i] for i in batch]), strict=True))
                progress.update(len(batch))

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample]) -> list[str]:
        """One batch: the new tokens of each row, decoded without special tokens."""
        inputs = {name: tensor.to(self.device) for name, tensor in self.encoder.prompts(list(samples)).items()}
        # Pictures come in float32; integer inputs (ids, masks, grids) stay as they are.
        inputs = {n: t.to(self.model.dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        sequences = self.model.generate(**inputs, **self.options)
        new = sequences[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _options(defaults: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, Any]:
    """Greedy decoding, whatever sampling the model's own generation config asks for."""
    # Chat models may end with one of several tokens; only their generation config knows them all.
    eos = defaults.eos_token_id if defaults.eos_token_id is not None else tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the model names no end token: neither generation_config.json nor the tokenizer has one")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return {**greedy, "max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": pad}


def template_hash(model_path: str) -> str:
    """SHA-256 of the chat template that the processor of this directory applies."""
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model_path}: its processor cannot be loaded: {error}") from error
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise ConfigError(f"model.path={model_path}: the processor has no chat template")
    return hashlib.sha256(str(template).encode()).hexdigest()


def model_hash(model_path: str) -> str:
    """SHA-256 over the directory's weights, configs and templates, names included: what decides the answers."""
    folder = Path(model_path)
    files = sorted(f for pattern in ("*.safetensors", "*.json", "*.jinja") for f in folder.glob(pattern))
    if not any(f.suffix == ".safetensors" for f in files):
        raise ConfigError(
            f"model.path={model_path}: no *.safetensors here; give a Hugging Face model directory, such as a "
            "run's export/ (`mirage export` writes one)"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then, as logs want it."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done, self.shown = total, what, 0, 0
        self.bar = tqdm(total=total, desc=what, unit="answer") if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.done * PLAIN_LINES // self.total > self.shown:
            self.shown = self.done * PLAIN_LINES // self.total
            print(f"{self.what}: {self.done} of {self.total}", flush=True)
