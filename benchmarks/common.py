"""Shared by the benchmarks: generated models and data, processes of several ranks, and the head of every result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

MIB = 1 << 20
RESULTS = Path(os.environ.get("MIRAGE_RESULTS") or Path(__file__).parent / "results")
VOCABULARY = 32_000
TRAILING_LINES = 30  # of the log of a rank that failed


# ------------------------------------------------------------------------------------------------ the record


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str, threads: int) -> dict[str, Any]:
    """The hardware, without the host's name. threads: those that one process computes with."""
    hardware: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads}
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        hardware["cpu"] = names[0].partition(": ")[2] if names else None
    hardware |= load("load_before")
    if device == "cuda":
        import torch

        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def load(name: str) -> dict[str, float]:
    """{name: the machine's load average over a minute}: shows other work on the machine. Empty where unknown."""
    return {name: round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}


def record(device: str, packages: Sequence[str], arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Command, date, hardware and versions: the head of every result. Call it before measuring anything."""
    return {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *arguments]),
        "date": date.today().isoformat(),
        "hardware": machine(device, threads),
        "versions": {package: version_of(package) for package in packages},
    }


def write(name: str, result: Mapping[str, Any]) -> None:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def say_targets(judged: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Print each target as met or MISSED; return the list for the result file."""
    for what, met in judged:
        print(f"{'met   ' if met else 'MISSED'}  {what}", flush=True)
    return [{"what": what, "met": met} for what, met in judged]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def profile(run: Callable[[], object], device: str, rows: int) -> str:
    """Where the time of one call goes, as a table: operators on a CPU, kernels on a GPU, the costliest first."""
    import torch

    kinds, gpu = torch.profiler.ProfilerActivity, device == "cuda"
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if gpu else [kinds.CPU]) as profiler:
        run()
        if gpu:
            torch.cuda.synchronize()
    by = "self_device_time_total" if gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=60)


# ---------------------------------------------------------------------------------------------------- ranks


def start_ranks(command: Sequence[str], ranks: int, **options: Any) -> list[subprocess.Popen]:
    """Start one process per rank, with one thread each unless OMP_NUM_THREADS says otherwise. options: Popen's."""
    from mirage_dist.ranks import free_port

    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
    }
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


class RankFailed(RuntimeError):
    """A rank ended instead of answering; the message holds the end of its log."""


class Job:
    """Processes of one job that execute one command at a time and idle in between, so that jobs can take turns.

    Each rank reads a word per line from its standard input and answers each with a line of JSON (see `answers`). What
    libraries print goes to `log`.
    """

    def __init__(self, command: Sequence[str], ranks: int, log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file, "text": True}
            self.processes = start_ranks(command, ranks, **pipes)

    def send(self, word: str) -> None:
        """Send the command `word` to every rank."""
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # `receive` then reports the reason
                process.stdin.write(word + "\n")
                process.stdin.flush()

    def receive(self) -> list[dict[str, Any]]:
        """Every rank's answer to the last command. Raises RankFailed when a rank has ended."""
        return [self._answer(process) for process in self.processes]

    def request(self, word: str) -> list[dict[str, Any]]:
        """Send the command `word` to every rank and return the answers."""
        self.send(word)
        return self.receive()

    def _answer(self, process: subprocess.Popen) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RankFailed("\n".join(self.log.read_text().splitlines()[-TRAILING_LINES:]))
        return json.loads(line)

    def close(self) -> None:
        """Kill every rank and wait for its end."""
        for process in self.processes:
            process.kill()  # a benchmark's rank has nothing to save
            process.wait()


def requests() -> Iterator[tuple[str, Callable[[Any], None]]]:
    """The rank's side of a `Job`: every command, and the function that sends its answer.

    Standard output is reserved for answers; everything else that is printed goes to standard error.
    """
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        yield line.strip(), lambda answer: print(json.dumps(answer), file=output, flush=True)


def answers(answer: Callable[[str], Any]) -> None:
    """Call `answer(word)` for every command and send its return value (see `requests`)."""
    for word, send in requests():
        send(answer(word))


# ------------------------------------------------------------------------------------------- model and data


@dataclass(frozen=True)
class Size:
    """A LLaVA: CLIP of `vision_layers` x `vision_hidden`, then Llama of `layers` x `hidden`; and its samples.

    A sample has `tokens` tokens, including the picture's (side / patch squared) and `response` tokens for the answer
    and its end token. The proportions are LLaVA-1.5's: 576 picture and 60 response tokens of 676.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    side: int
    tokens: int
    response: int
    dtype: str = "fp32"
    patch: int = 14

    @property
    def picture_tokens(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def tap(self) -> int:
        """The last of the first quarter of the decoder's layers: layer 7 of LLaVA's 32, numbered from 0."""
        return self.layers // 4 - 1


SIZES = {
    "tiny": Size("tiny", 8, 64, 176, 4, 2, 32, 2, side=56, tokens=64, response=8),
    "58m": Size("58m", 8, 512, 1376, 8, 6, 128, 2, side=196, tokens=256, response=23),
    # As many layers as LLaVA-1.5-7B and almost no work in them: what is left of a step is what its host does.
    "7b_narrow": Size("7b_narrow", 32, 64, 176, 4, 24, 32, 2, side=56, tokens=64, response=8),
    # A quarter of LLaVA-1.5-7B's decoder layers: all of its parameters train within 80 GB.
    "7b_quarter": Size("7b_quarter", 8, 4096, 11008, 32, 24, 1024, 16, side=336, tokens=676, response=60, dtype="bf16"),
    "7b": Size("7b", 32, 4096, 11008, 32, 24, 1024, 16, side=336, tokens=676, response=60, dtype="bf16"),
}


def make_model(size: Size, folder: Path, device: str) -> int:
    """A Hugging Face directory with random weights, tokenizer and processor; returns the number of parameters."""
    import torch

    from mirage_dist.ranks import no_bars_in_logs

    no_bars_in_logs()
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from mirage_dist.model.load import DTYPES

    processor = make_processor(size)
    ids = processor.tokenizer.get_vocab()
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=4 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.side,
        patch_size=size.patch,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=max(2048, size.tokens),
        pad_token_id=ids["<pad>"],
        bos_token_id=None,
        eos_token_id=ids["<end>"],
        dtype=DTYPES[size.dtype],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=size.picture_tokens,
        dtype=DTYPES[size.dtype],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).to(DTYPES[size.dtype])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # the ranks need the memory
    return parameters


def make_processor(size: Size) -> Any:
    """A tokenizer of VOCABULARY words, one token each, and CLIP's transform of pictures."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from mirage_dist.embedded.model import CHAT_TEMPLATE, SPECIAL, as_tokenizer

    words = [*SPECIAL, *(word(i) for i in range(VOCABULARY - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({text: i for i, text in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = as_tokenizer(backend)
    side = size.side
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def word(number: int) -> str:
    """A different word of three syllables for every number below a million."""
    consonants, vowels = "bcdfghjklmnpqrstvwxz", "aeiou"
    syllables = (number // 10_000, number // 100 % 100, number % 100)
    return "".join(consonants[s // 5] + vowels[s % 5] for s in syllables)


def make_samples(size: Size, folder: Path, streams: Sequence[str], count: int) -> None:
    """Write STREAM.jsonl in the `samples` format: smooth colour pictures, every other one JPEG, and random words."""
    import numpy as np
    from PIL import Image

    from mirage_dist.data.formats.samples import write_samples
    from mirage_dist.data.sample import Sample

    folder.mkdir(parents=True, exist_ok=True)
    question_tokens = size.tokens - size.picture_tokens - size.response - 2  # two role markers
    generator = np.random.default_rng(0)

    def words(number: int) -> str:
        return " ".join(word(int(i)) for i in generator.integers(VOCABULARY - 100, size=number))

    for stream in streams:
        samples = []
        for i in range(count):
            file = folder / f"{stream}-{i:04d}.{'jpg' if i % 2 else 'png'}"
            # Smooth, because white noise compresses unlike any photograph.
            coarse = Image.fromarray(generator.integers(256, size=(12, 12, 3), dtype=np.uint8))
            coarse.resize((size.side, size.side), Image.Resampling.BICUBIC).save(file)
            question, answer = words(question_tokens), words(size.response - 1)
            samples.append(Sample(f"{stream}-{i}", str(file), question, answer, True, "", stream))
        write_samples(folder / f"{stream}.jsonl", samples)
