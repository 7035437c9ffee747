"""A worker whose model lies on two devices: `python parallel_engine.py MODEL SAMPLES` (tests/unit/evals/test_vllm.py).

Prints one JSON object: whether vLLM's two processes answer as transformers does, and again after every process has got
the signals of a scheduler, and the numbers of these processes. Then it starts to answer without an end.
"""

import json
import os
import signal
import subprocess
import sys
import threading

from mirage_dist import signals
from mirage_dist.data import formats, sources
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.models.vllm import VLLM
from mirage_dist.schema import EvalModelConfig, GenerationConfig, TemplateConfig


def main(model: str, file: str) -> None:
    signals.install()
    samples = sources.read(formats.source("samples", file)).samples
    options = EvalModelConfig(path=model, dtype="fp32"), TemplateConfig()
    decoding = {"max_new_tokens": 32, "batch_size": 16}
    generation = GenerationConfig(**decoding, backend="vllm", gpu_memory_utilization=0.2, tensor_parallel=2)
    expected = HuggingFace(*options, GenerationConfig(**decoding)).answer(samples)
    engine = VLLM(*options, generation)
    listed = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "Worker_TP"], capture_output=True, text=True)
    processes = [int(pid) for pid in listed.stdout.split()]
    before = engine.answer(samples)
    threading.Timer(0.05, signal_all, [[*processes, os.getpid()]]).start()
    during = engine.answer(samples)
    after = engine.answer(samples)
    result = {"same": [answers == expected for answers in (before, during, after)], "signal": signals.received()}
    print(json.dumps({**result, "different": len(set(expected)), "processes": processes}), flush=True)
    while True:
        engine.answer(samples)


def signal_all(processes: list[int]) -> None:
    for pid in processes:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(pid, number)


if __name__ == "__main__":  # which a spawned process of vLLM does not take for its own
    main(*sys.argv[1:])
