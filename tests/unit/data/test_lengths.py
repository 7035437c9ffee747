"""What does not fit is known before any picture is opened or weight is loaded, and as `encode` would say."""

from dataclasses import replace

import pytest
from transformers import AutoProcessor

from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import Encoder, TooLong


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
