"""What each column of the matrix claims, held against plain transformers.

Every check takes the finished runs of one family (`Runs`) and fails by an assertion, or raises Refused with the
message with which the product refuses the family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import IGNORE, Batch
from mirage_dist.data.sample import Sample
from mirage_dist.evals.models import hf as engine
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.model import load
from mirage_dist.model.families import by_row, processors, roles
from mirage_dist.model.policy import Request
from mirage_dist.model.shards import Shards
from mirage_dist.schema import EvalModelConfig, GenerationConfig, ModelConfig, TemplateConfig

EXACT = 1e-6  # of a loss
APART = 5e-6  # of losses whose sums are taken in another order
TEMPLATE = TemplateConfig(max_length=512)
GENERATION = GenerationConfig(max_new_tokens=8, batch_size=4)


class Refused(Exception):
    """The product refuses what the column needs; the message is the product's."""


@dataclass(frozen=True)
class Runs:
    """One family: its model directory, its data, and its runs. `ended(run)` waits for a run; see `rank.py`."""

    base: Path
    data: Path
    folder: Path
    end: str  # the mark that ends an answer
    ended: Callable[[str], dict[str, Any]]

    def __getitem__(self, run: str) -> Path:
        """The directory of a run that went to its end. Raises Refused."""
        outcome = self.ended(run)
        assert "failed" not in outcome, outcome["failed"]
        if "refused" in outcome:
            raise Refused(outcome["refused"])
        return self.folder / run

    def losses(self, run: str) -> torch.Tensor:
        """(steps, 1 + terms)"""
        records = [json.loads(line) for line in (self[run] / "metrics.jsonl").read_text().splitlines()]
        return torch.tensor([[record["loss"], *record["terms"].values()] for record in records])

    def samples(self, stream: str) -> list[Sample]:
        return sources.read(formats.source("samples", str(self.data / f"{stream}.jsonl"), None)).samples

    @cached_property
    def hf(self) -> Any:
        """The base model as plain transformers loads it, in evaluation mode."""
        return plain(self.base)

    @cached_property
    def encoder(self) -> Any:
        return engine.encoder(processors.load(self.base), TEMPLATE, self.hf.config)


def plain(folder: Path) -> Any:
    """A model directory as plain transformers loads it."""
    from transformers import AutoConfig

    return roles.auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


# ------------------------------------------------------------------------------------------------------- columns


def sft(runs: Runs) -> None:
    """Step 1 has the loss that plain transformers has on the same tokens, and the labels are answers and end tokens."""
    first = runs.losses("sft")[0, 0]  # the step's batch is the whole stream
    batches = [runs.encoder.encode([sample]) for sample in runs.samples("retain")]
    nll = [x for s, batch in zip(runs.samples("retain"), batches, strict=True) for x in _nll(runs.hf, s, batch)]
    torch.testing.assert_close(first, torch.tensor(nll).double().mean().float(), atol=EXACT, rtol=EXACT)
    for sample, batch in zip(runs.samples("retain"), batches, strict=True):
        _check_labels(runs, sample, batch)


def npo(runs: Runs) -> None:
    """At step 1 the policy is its reference: margins are 0. Later the loss differs."""
    losses = runs.losses("npo")
    torch.testing.assert_close(losses[0, 1], torch.tensor(2 / 0.5 * math.log(2)), atol=1e-5, rtol=0)
    assert losses[1:, 1].max() < losses[0, 1] - 1e-4


def two_ranks(runs: Runs) -> None:
    """Two ranks under ZeRO-3 have the losses of one."""
    torch.testing.assert_close(runs.losses("npo_2"), runs.losses("npo"), atol=APART, rtol=APART)


def rmu(runs: Runs) -> None:
    """The tapped layer of a truncated model has the whole model's hidden states, pictured and text-only rows alike."""
    assert runs.losses("rmu").isfinite().all()
    policy = load.policy(ModelConfig(str(runs.base)), "fp32", {}, depth=2)
    batch = runs.encoder.encode(runs.samples("forget"))
    by_row.keep_apart(runs.hf)  # transformers lets rows without a picture read the others' in a mixed batch
    with torch.no_grad():
        tapped = policy.eval()(batch.inputs, Request(layers=(1,))).activations_BSD
        whole = runs.hf(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states[2]
    assert tapped is not None
    read = batch.unpadded_BS.bool()
    torch.testing.assert_close(tapped[1][read], whole[read], atol=1e-5, rtol=1e-5)


def lora(runs: Runs) -> None:
    """New adapters change nothing, trained ones do; the export holds their product added to the decoder's weights."""
    torch.testing.assert_close(runs.losses("lora")[0], runs.losses("npo")[0], atol=APART, rtol=APART)
    hf, merged = runs.hf, plain(runs["lora"] / "export")
    checkpoint = sorted((runs["lora"] / "checkpoints").glob("step-*"))[-1]
    with Shards(checkpoint) as shards:
        adapters = {name: shards.whole(name) for name in shards.shapes}
    changed = {name for name, weight in merged.named_parameters() if not torch.equal(weight, hf.get_parameter(name))}
    assert changed
    assert {roles.Parts(hf).role_of[name] for name in changed} == {"decoder"}
    for name in changed:
        place = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = (adapters[f"{place}.lora_{which}.default.weight"] for which in "AB")
        product = 8 / 4 * up @ down  # alpha over rank
        torch.testing.assert_close(merged.get_parameter(name), hf.get_parameter(name) + product, atol=1e-6, rtol=1e-6)


def packing(runs: Runs) -> None:
    """Packed rows have the losses of padded ones."""
    torch.testing.assert_close(runs.losses("packed"), runs.losses("npo"), atol=APART, rtol=APART)


def cache(runs: Runs) -> None:
    """The vision tower's output, read back from the disk, gives the losses that the tower gives."""
    torch.testing.assert_close(runs.losses("cached"), runs.losses("npo"), atol=APART, rtol=APART)


def evaluation(runs: Runs) -> None:
    """Answers do not depend on the batch: prompts of several lengths, left-padded, against one at a time."""
    one, four = (_responses(runs[f"eval_{size}"].with_name("eval") / "evals" / f"by_{size}") for size in (1, 4))
    assert one == four
    assert len(one) == len(runs.samples("forget"))
    model = HuggingFace(EvalModelConfig(path=str(runs.base), dtype="fp32"), TEMPLATE, GENERATION)
    samples = runs.samples("forget")
    together = _generated(model, samples)
    for number, sample in enumerate(samples):
        (alone,) = _generated(model, [sample])
        torch.testing.assert_close(together[number][: len(alone)], alone, atol=1e-4, rtol=1e-4)


def export(runs: Runs) -> None:
    """What trained is in the export bitwise, the rest is the base's, and its other files are the base's own."""
    out = runs["sft"] / "export"
    before, after = runs.hf, plain(out)
    role_of = roles.Parts(before).role_of
    checkpoint = sorted((runs["sft"] / "checkpoints").glob("step-*"))[-1]
    with Shards(checkpoint) as shards:
        trained = {name: shards.whole(name) for name in shards.shapes}
    assert {role_of[name] for name in trained} == {r for r in role_of.values() if r in ("decoder", "head", "connector")}
    for name, weight in after.named_parameters():
        assert torch.equal(weight, trained.get(name, before.get_parameter(name))), name
    moved = {role_of[n] for n, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(n))}
    assert moved == {role for role in role_of.values() if role in ("decoder", "head", "connector")}
    assert tensors(out).keys() == tensors(runs.base).keys()
    for file in runs.base.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "generation_config.json"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    again = engine.encoder(processors.load(out), TEMPLATE, after.config)
    for sample in runs.samples("forget"):
        ours, theirs = again.encode([sample]).inputs, runs.encoder.encode([sample]).inputs
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------------- details


def _nll(hf: Any, sample: Sample, batch: Batch) -> Iterator[float]:
    """−log p of every label of one row: a plain forward without padding, and without the placeholder picture."""
    shown = batch.unpadded_BS[0].bool()
    inputs = dict(batch.inputs)
    if sample.image is None:
        inputs = {"input_ids": inputs["input_ids"][:, shown]}
    labels = batch.labels_BS[0, shown]
    with torch.no_grad():
        logp = hf(**inputs, use_cache=False).logits[0].double().log_softmax(-1)
    for place in (labels != IGNORE).nonzero().flatten().tolist():
        yield -logp[place - 1, labels[place]].item()


def _check_labels(runs: Runs, sample: Sample, batch: Batch) -> None:
    """The labelled tokens are the answers through their end tokens; the tokens before the last are its prompt's."""
    tokenizer, labels = runs.encoder.tokenizer, batch.labels_BS[0].tolist()
    spans: list[list[int]] = []
    for before, label in zip([IGNORE, *labels], labels, strict=False):
        if label != IGNORE:
            spans.append([label]) if before == IGNORE else spans[-1].append(label)
    answers = [answer for _, answer in sample.history] + [sample.answer]
    assert [tokenizer.decode(span).strip() for span in spans] == [f"{answer}{runs.end}" for answer in answers]
    end = len(labels) - labels[::-1].index(spans[-1][-1])
    ids = batch.inputs["input_ids"][0, : end - len(spans[-1])]
    prompt = runs.encoder.prompts([sample])
    assert torch.equal(ids, prompt["input_ids"][0])
    if not sample.history:
        assert torch.equal(ids, _prompt_by_processor(runs, sample))


def _prompt_by_processor(runs: Runs, sample: Sample) -> torch.Tensor:
    """The prompt's tokens as the model's card has one make them."""
    from PIL import Image

    processor, tokenizer = runs.encoder.processor, runs.encoder.tokenizer
    content: Any = sample.question
    if processor is not tokenizer:
        content = [*([{"type": "image"}] if sample.image else []), {"type": "text", "text": sample.question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    start = tokenizer.bos_token
    options: dict[str, Any] = {"add_special_tokens": start is None or not text.startswith(start)}
    if sample.image is None:
        return tokenizer(text, return_tensors="pt", **options)["input_ids"][0]
    picture = Image.open(sample.image).convert("RGB")
    return processor(text=[text], images=[[picture]], return_tensors="pt", **options)["input_ids"][0]


def _responses(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for file in folder.glob("rows/*.jsonl") for line in file.read_text().splitlines()]
    return {row["id"]: row["response"] for row in rows}


def _generated(model: HuggingFace, samples: list[Sample]) -> list[torch.Tensor]:
    """Log-probabilities (tokens, vocabulary) of what each sample's answer consists of, its end token included."""
    inputs = model.prompts(samples)
    with torch.inference_mode():
        made = model.model.generate(**inputs, **model.options, output_logits=True, return_dict_in_generate=True)
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(model.options["eos_token_id"]).flatten()
    logp = torch.stack(made.logits, 1).float().log_softmax(-1)
    lengths = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in new]
    return [logp[number, :length] for number, length in enumerate(lengths)]


COLUMNS: dict[str, Callable[[Runs], None]] = {
    "SFT": sft,
    "NPO": npo,
    "RMU": rmu,
    "LoRA": lora,
    "packing": packing,
    "cache": cache,
    "2 ranks": two_ranks,
    "eval": evaluation,
    "export → reload": export,
}
