"""The product on a real language model's first layers: its byte-level BPE, ChatML with a default system prompt, and
embeddings that are tied to the head.
"""

from dataclasses import replace

import pytest
import torch
from conftest import launch, metrics, terms_and_gradients
from transformers import AutoModelForImageTextToText, AutoProcessor

from mirage_dist import config as configs
from mirage_dist.countries import flags
from mirage_dist.data import formats
from mirage_dist.data.encoding.collate import IGNORE, Encoder
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.model import load, reference
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import EvalModelConfig, GenerationConfig, TemplateConfig, TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.streams import read_streams

ONE = Group(0, 0, 1, torch.device("cpu"))
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ANSWERS = [
    "The capital of France is Paris.",
    "København — naïve, 東京, 🙂, and 12 of 345.",
    "I'm sorry, but I can't help with that.",
    "Two  spaces, a tab\tand a line\nbreak",
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Two with a picture, two without, one of them of two turns; in the file samples.jsonl beside the pictures."""
    folder = tmp_path_factory.mktemp("real")
    made = []
    for number, answer in enumerate(ANSWERS):
        picture = None
        if number % 2 == 0:
            picture = str(folder / f"{number}.png")
            flags.draw(list(flags.FLAGS)[number]).save(picture)
        history = (("Which flag is this?", "France’s."),) if number == 1 else ()
        question = f"Share the capital of country {number}, please."
        made.append(Sample(f"s{number}", picture, question, answer, True, "", "made", history))
    write_samples(folder / "samples.jsonl", made)
    return folder, made


def feed_of(real, samples, options, packing, targets):
    objective, (folder, _) = make(options), samples
    given = [f"run.dir={folder}/run", f"model.path={real.llava}", f"model.train=[{targets}]", "world.dir=none"]
    given += ["train.global_batch=4", "train.micro_batch=2", f"data.packing={packing}"]
    recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
    streams = {name: [formats.source("samples", f"{folder}/samples.jsonl")] for name in objective.needs.streams}
    data = replace(recipe.data, streams=streams, refusals_in_forget="allow", max_length=256)
    recipe = replace(recipe, data=data, objective=options)
    return (
        objective,
        recipe,
        Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model)),
    )


def step(real, samples, options, packing=False, targets="decoder"):
    """Terms and gradients of one step, and its micro-batches."""
    objective, recipe, feed = feed_of(real, samples, options, str(packing).lower(), targets)
    policy = load.policy(recipe.model, "fp32", {})
    other = None
    if objective.needs.reference:
        other = reference.Frozen(load.policy(recipe.model, "fp32", {}, frozen=True))
    objective.start(policy.hidden_size, seed=1)
    window = feed.window(0, ONE)
    return *terms_and_gradients(objective, feed, window, policy, other), window


def test_labels_are_exactly_the_assistants_turns(real, samples):
    processor = AutoProcessor.from_pretrained(real.llava)
    tokenizer = processor.tokenizer
    for sample in samples[1]:
        batch = Encoder(processor, picture_token=processor.image_token_id).encode([sample])
        seen = batch.unpadded_BS[0].bool()  # a row without picture has a placeholder, which nothing sees
        ids, labelled = batch.inputs["input_ids"][0, seen], batch.labels_BS[0, seen] != IGNORE
        turns = [answer for _, answer in sample.history] + [sample.answer]
        starts = [i for i in range(len(ids)) if labelled[i] and not labelled[i - 1]]
        runs = [ids[i : i + int((~labelled[i:]).int().argmax() or len(ids) - i)] for i in starts]
        assert [tokenizer.decode(run) for run in runs] == [f"{turn.strip()}<|im_end|>" for turn in turns]
        for start in starts:
            assert tokenizer.decode(ids[:start]).endswith("<|im_start|>assistant\n")
        rest = tokenizer.decode(ids[~labelled])
        assert rest.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        assert rest.count("<image>") == (16 if sample.image else 0)
        # The whole is what the tokenizer makes of the rendered conversation.
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids.tolist()


def test_a_step_is_plain_transformers(real, samples):
    """The gradient of the tied matrix has a part from the head and one from the embedding."""
    values, slopes, window = step(real, samples, {"name": "sft"})
    plain = AutoModelForImageTextToText.from_pretrained(real.llava, dtype=torch.float32)
    plain.model.vision_tower.requires_grad_(False)
    plain.model.multi_modal_projector.requires_grad_(False)
    count = sum(int((micro.batch.labels_BS[:, 1:] != IGNORE).sum()) for micro in window)
    total = 0.0
    for micro in window:
        loss = plain(**micro.batch.inputs, labels=micro.batch.labels_BS).loss
        share = int((micro.batch.labels_BS[:, 1:] != IGNORE).sum()) / count
        (loss * share).backward()
        total += float(loss.detach()) * share
    assert values["ce"] == pytest.approx(total, rel=1e-5)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert len(slopes) == len(expected) == 2 + 9 * 2  # embeddings and norm, and two layers of nine matrices
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        (own,) = (g for other, g in slopes.items() if other.endswith(name))
        assert (own - gradient).norm() <= 1e-5 * norm, name


@pytest.mark.parametrize("name", ["sft", "npo", "rmu"])
def test_a_packed_step_is_the_padded_one(real, samples, name):
    options = {"name": name} | ({"layer": 1, "positions": "unpadded"} if name == "rmu" else {})
    padded, packed = (step(real, samples, options, packing, "decoder.layers.*")[:2] for packing in (False, True))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-4, atol=1e-5)
    assert packed[1].keys() == padded[1].keys()
    norm = torch.stack([g.norm() for g in padded[1].values()]).norm()
    for parameter, gradient in padded[1].items():
        assert (packed[1][parameter] - gradient).norm() <= 1e-4 * norm, parameter


def test_a_trained_model_is_exported_tied_and_answers_as_transformers_does(real, samples):
    folder, made = samples
    run = folder / "trained"
    streams = f"data.streams.train=[{{format: samples, path: {folder}/samples.jsonl}}]"
    given = [
        f"run.dir={run}",
        f"model.path={real.llava}",
        "world=null",
        streams,
        "seed=3",
        "model.train=null",
        "data.max_length=256",
    ]
    given += ["model.lora={rank: 4, alpha: 8, dropout: 0.0, targets: [decoder]}", "train.export=merged"]
    given += ["train.max_steps=2", "train.global_batch=4", "train.micro_batch=4", "train.lr=0.01"]
    launch(1, "train", "configs/train/demo_sft.yaml", *given)
    losses = [record["loss"] for record in metrics(run)]
    assert losses[1] < losses[0]
    model = AutoModelForImageTextToText.from_pretrained(run / "export", dtype=torch.float32).eval()
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    ours = HuggingFace(
        EvalModelConfig(path=str(run / "export"), dtype="fp32"), TemplateConfig(), GenerationConfig(max_new_tokens=6)
    )
    processor = AutoProcessor.from_pretrained(run / "export")
    for sample, answer in zip(made, ours.answer(made), strict=True):
        content = [{"type": "text", "text": sample.question}]
        content = [{"type": "image"}, *content] if sample.image else content
        messages = [
            m for q, a in sample.history for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
        ]
        text = processor.apply_chat_template(
            [*messages, {"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [flags.draw(list(flags.FLAGS)[made.index(sample)])] if sample.image else None
        row = processor(text=[text], images=images, return_tensors="pt")
        new = model.generate(**row, max_new_tokens=6, do_sample=False)[0, row["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == answer
