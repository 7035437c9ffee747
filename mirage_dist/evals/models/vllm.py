"""`generation.backend: vllm`: vLLM in place of transformers, for GPUs (docs/evaluation.md says how to install it).

vLLM gets the same input as transformers in `evals.models.hf`: the token ids of the same chat template, the picture
padded in the same way, the same end tokens; and it decodes greedily, or draws by the same seeds. It runs the model's
own processor and schedules rows itself. For the first prompt with a picture and the first one without, the tokens that
vLLM used are compared with those of `data.encoding.collate`.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mirage_dist import signals
from mirage_dist.data.encoding.conversation import tokenizer_of
from mirage_dist.data.sample import Draw, Sample
from mirage_dist.evals import pool
from mirage_dist.evals.models.base import Generator
from mirage_dist.evals.models.hf import encoder, greedy
from mirage_dist.evals.models.memory import out_of_memory
from mirage_dist.model.families import configs, processors
from mirage_dist.schema import ConfigError, EvalModelConfig, GenerationConfig, RunError, TemplateConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Options of a generation config that transformers applies under greedy decoding and vLLM, as used here, does not.
UNKNOWN = ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "min_new_tokens")
ENVIRONMENT = {
    # The engine runs in this process, so a killed worker leaves no engine process that keeps the GPU. On several GPUs
    # each has a process of its own all the same, which dies with this one (see `vllm_worker`).
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # This process has threads and signal handlers, and may have used its GPU: a fork of it would have them too.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def _library() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"generation.backend=vllm: vLLM cannot be imported ({error}); install it as docs/evaluation.md says "
            "(Engines), or use hf"
        ) from error


class VLLM(Generator):
    """Runs all rows of a chunk at once. Leaving it as a context releases the GPU.

    `generation.tensor_parallel` GPUs hold the model together, of those that this process sees.

    Raises ConfigError when vLLM is not installed or does not support the model, and RunError when the GPU has too
    little free memory, or when vLLM used other prompt tokens than training does. What it draws by a seed is not what
    transformers draws by it.
    """

    seeded = True

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"vllm": _library().__version__}

    @classmethod
    def check(cls, generation: GenerationConfig) -> None:
        if visible := torch.cuda.device_count():  # without a GPU, vLLM's build for CPUs starts processes in their place
            pool.check_gpus(generation.tensor_parallel, visible)

    def __init__(self, model: EvalModelConfig, template: TemplateConfig, generation: GenerationConfig) -> None:
        vllm = _library()
        from transformers import GenerationConfig as Defaults

        super().__init__(model, template, generation)
        path = Path(self.path)
        config, processor = configs.load(path), processors.load(path)
        try:
            defaults: Any = Defaults.from_pretrained(path, local_files_only=True)
        except OSError:  # a model need not have one
            defaults = Defaults.from_model_config(config)
        if unknown := [name for name in UNKNOWN if getattr(defaults, name, None)]:
            raise ConfigError(
                f"model.path={path}: its generation config sets {', '.join(unknown)}, which backend vllm does not "
                "apply; use generation.backend=hf"
            )
        self.tokenizer = tokenizer_of(processor)
        self.encoder = encoder(processor, template, config)
        eos = greedy(defaults, self.tokenizer, generation.max_new_tokens)["eos_token_id"]
        self.sampling: Any = partial(
            vllm.SamplingParams,
            max_tokens=generation.max_new_tokens,
            repetition_penalty=defaults.repetition_penalty or 1.0,
            # Only these end an answer, as with transformers; vLLM would add the tokenizer's own end token.
            stop_token_ids=eos if isinstance(eos, list) else [eos],
            ignore_eos=True,
            detokenize=False,
        )
        room = template.max_length + generation.max_new_tokens
        most = getattr(config.get_text_config(), "max_position_embeddings", None) or room
        self.gpus = generation.tensor_parallel
        self.engine: Any = start(vllm, model, generation, min(room, most), self.encoder.text_only)
        self.compared: set[bool] = set()

    def close(self) -> None:
        """Release the GPU's memory, which judges and the next checkpoint may need; the engine is full of cycles."""
        self.engine.llm_engine.engine_core.shutdown()
        self.engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answer(self, samples: Sequence[Sample]) -> list[str]:
        prompts = [_prompt(*self.encoder.prompt(sample)) for sample in samples]
        try:
            outputs = self.engine.generate(prompts, [self._sampling(s.draw) for s in samples], use_tqdm=False)
        except Exception as error:  # a lost process is reported by an assertion, a timeout or a RuntimeError
            if out_of_memory(error):
                raise _no_room(len(samples)) from error
            if self.gpus == 1:
                raise
            raise RunError(
                f"one of vLLM's processes on {self.gpus} GPUs failed or was killed, and the cause is above ({error}); "
                "every answer so far is on disk, and the next start does what is missing"
            ) from error
        for sample, output in zip(samples, outputs, strict=True):
            self._compare(sample, list(output.prompt_token_ids))
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _sampling(self, draw: Draw | None) -> Any:
        """vLLM's parameters of one answer."""
        if draw is None:
            return self.sampling(temperature=0)
        return self.sampling(temperature=draw.temperature, top_p=draw.top_p, seed=draw.seed)

    def _compare(self, sample: Sample, used: list[int]) -> None:
        """Compare the prompt tokens that vLLM used with those of training, once with a picture and once without."""
        pictured = sample.image is not None
        if pictured in self.compared:
            return
        self.compared.add(pictured)
        if used != self.encoder.prompts([sample])["input_ids"][0].tolist():
            raise RunError(
                f"vLLM does not see the prompt of {sample.source}, id {sample.id!r}, as training does: other tokens, "
                "or another number of picture tokens; use generation.backend=hf for this model"
            )


def _prompt(ids: list[int], picture: Any) -> dict[str, Any]:
    return {"prompt_token_ids": ids, **({} if picture is None else {"multi_modal_data": {"image": picture}})}


def start(vllm: Any, model: EvalModelConfig, generation: GenerationConfig, max_length: int, text_only: bool) -> Any:
    """An engine of vLLM: in this process, or on several GPUs with a process for each.

    vllm: the package. Raises ConfigError and RunError as `VLLM`, and StopRequested when a signal ended the start.
    """
    parallel = generation.tensor_parallel
    several = {
        "tensor_parallel_size": parallel,
        "distributed_executor_backend": "mp",  # processes of this machine, also where Ray is installed
        "worker_extension_cls": "mirage_dist.evals.models.vllm_worker.Dependent",
    }
    try:
        return vllm.LLM(
            model=str(model.path),
            dtype=DTYPES[model.dtype],
            max_model_len=max_length,
            max_num_seqs=generation.batch_size,
            gpu_memory_utilization=generation.gpu_share,
            **(several if parallel > 1 else {}),
            **({} if text_only else {"limit_mm_per_prompt": {"image": 1}}),
            generation_config="vllm",  # no defaults: the sampling parameters hold all that matters of the model's own
            enforce_eager=not torch.cuda.is_available(),  # on a CPU compiling takes longer than it can save
            use_tqdm_on_load=sys.stderr.isatty(),
            seed=0,
        )
    except Exception as error:
        if parallel > 1 and (name := signals.received()):  # it ends a process of vLLM that is only starting
            stopped = f"stopped by {name} while vLLM started; every answer so far is on disk"
            raise signals.StopRequested(stopped) from error
        if parallel == 1 and not isinstance(error, (ValueError, RuntimeError)):
            raise
        if "memory" in str(error):
            raise _no_room(generation.batch_size) from error
        if heads := re.search(r"Total number of attention heads \((\d+)\) must be divisible", str(error)):
            raise ConfigError(
                f"generation.tensor_parallel={parallel}: vLLM shares out attention heads among GPUs, and "
                f"{model.path} has {heads[1]}; choose a divisor of that"
            ) from error
        if parallel == 1 or isinstance(error, ValueError):
            raise ConfigError(f"model.path={model.path}: vLLM cannot load it: {error}") from error
        # Of what happens in a process of a GPU, vLLM raises here no more than that something did, and logs the cause.
        raise RunError(
            f"generation.tensor_parallel={parallel}: vLLM did not start, and the cause is above: too little memory "
            "(change generation.gpu_memory_utilization, lower generation.batch_size, or take more GPUs), or a model "
            f"that it cannot load or share out among {parallel} GPUs ({model.path}): {error}"
        ) from error


def _no_room(rows: int) -> RunError:
    return RunError(
        f"vLLM has too little memory for {rows} rows at once (see above); change generation.gpu_memory_utilization, "
        "lower generation.batch_size, or use a larger GPU, or more of them (generation.tensor_parallel)"
    )
