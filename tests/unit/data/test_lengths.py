"""What does not fit is known before any picture is opened or weight is loaded, and as `encode` would say."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import Encoder, TooLong
from mirage_dist.data.encoding.lengths import measured
from mirage_dist.model.families import processors
from mirage_dist.schema import ConfigError


@pytest.fixture(scope="module")
def samples(toy):
    shown = sources.read(formats.source("samples", str(toy.root / "forget.jsonl"))).samples[:6]
    turns = (("what the place of this gadget ?", "it is cave"),)
    return [*shown, *(replace(s, history=turns) for s in shown), *(replace(s, image=None) for s in shown)]


@pytest.mark.parametrize("on_long", ["error", "truncate", "truncate_turns"])
def test_a_length_foresees_encode(toy, samples, on_long):
    processor = AutoProcessor.from_pretrained(toy.root / "model")
    outcomes = set()
    for limit in range(8, 60, 2):
        encoder = Encoder(processor, max_length=limit, on_long=on_long)
        whole = Encoder(processor)
        for sample in samples:
            # A picture beside it, so that a text-only row carries no placeholder.
            batch = whole.encode([sample, samples[0]])
            length = int(batch.inputs["attention_mask"][0].sum())
            labels = batch.labels_BS[0, :length].tolist()
            before = 1 + max(i for i, label in enumerate(labels) if label == -100)
            if on_long == "truncate_turns":
                before = next(i for i, label in enumerate(labels) if label != -100)
            fits = length <= limit or (on_long != "error" and before < limit)
            if fits:
                assert encoder.length(sample) == length
            else:
                with pytest.raises(TooLong, match=f"{length} tokens, {before} of them before"):
                    encoder.length(sample)
            outcomes.add((fits, length > limit))
    assert len(outcomes) == (2 if on_long == "error" else 3)


def test_a_length_opens_no_picture(toy, samples):
    encoder = Encoder(AutoProcessor.from_pretrained(toy.root / "model"))
    assert encoder.length(replace(samples[0], image="nowhere.png")) == encoder.length(samples[0])


# ------------------------------------------------------------------------------------------------------ in batches

WORDS = [
    "what",
    "is",
    "<image>",
    "<end>",
    "the colour",
    "",
    " ",
    "\n",
    "é",
    "日本",
    "user",
    "assistant",
    "[INST]",
    "x" * 40,
]
WORD = st.sampled_from(WORDS) | st.text(max_size=5)
TEXT = st.lists(WORD, max_size=8).map(" ".join)
MANY = st.lists(
    st.tuples(st.booleans(), TEXT, TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=2), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)


def outcome(measure):
    """What a measurement comes to: lengths, or the message of its error."""
    try:
        return measure()
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("name", ["toy", "llama_text", "qwen2_5_vl"])
def test_lengths_of_a_batch_are_those_of_its_samples_one_by_one(toy, family, samples, name):
    folder = toy.root / "model" if name == "toy" else family(name)
    processor = processors.load(folder)
    encoders = [Encoder(processor, *own) for own in ((2048,), (40, "error"), (40, "truncate_turns"))]
    picture = None if encoders[0].text_only else samples[0].image

    @settings(max_examples=20, deadline=None)
    @given(MANY)
    def check(many):
        own = [
            replace(
                samples[0],
                id=str(number),
                image=picture if shows else None,
                question=question,
                answer=answer,
                history=tuple(history),
                shown=min(shown, len(history)) if shows and picture else 0,
            )
            for number, (shows, question, answer, history, shown) in enumerate(many)
        ]
        for encoder in encoders:
            together = outcome(lambda: measured(encoder, own)[:, 0].tolist())  # noqa: B023
            assert together == outcome(lambda: [encoder.length(sample) for sample in own])  # noqa: B023

    check()


def test_responses_are_the_labels_of_the_rows(toy, samples):
    processor = AutoProcessor.from_pretrained(toy.root / "model")
    for limit in (2048, 30):
        encoder = Encoder(processor, limit, "truncate_turns")
        fitting = [s for s in samples if isinstance(outcome(lambda s=s: encoder.length(s)), int)]  # noqa: B023
        batch = encoder.encode(fitting)
        assert len(fitting) > 5
        assert measured(encoder, fitting)[:, 1].tolist() == (batch.labels_BS != -100).sum(1).tolist()


# ---------------------------------------------------------------------------------------------- text without a token


def test_unknown_tokens_are_counted_where_they_are_labels_and_not_of_a_tokenizer_of_bytes(toy, family, samples):
    words = ["it is cave", "it is Höhle", "Höhle Höhle", "日本"]
    own = [replace(s, id=str(i), question="Frage ?", answer=words[i % 4]) for i, s in enumerate(samples)]
    processor = AutoProcessor.from_pretrained(toy.root / "model")
    encoder, unknown = Encoder(processor), processor.tokenizer.unk_token_id
    labels = encoder.encode(own).labels_BS
    assert (labels == unknown).any()
    assert measured(encoder, own)[:, 2].tolist() == (labels == unknown).sum(1).tolist()
    text = [replace(s, image=None, history=(), shown=0) for s in own]
    assert measured(Encoder(processors.load(family("llama_text"))), text)[:, 2].tolist() == [0] * len(text)
