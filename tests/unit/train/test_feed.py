"""Which positions count for an activation, written out by hand for every kind of position a batch can have."""

import pytest
from PIL import Image

from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.train.feed import positions

# The template's tokens: role, 16 of the picture, the question's words, role, the answer's words, end.
SHOWN = [("role", 1), ("picture", 16), ("question", 4), ("role", 1), ("answer", 3)]
TEXT_ONLY = [("role", 1), ("question", 3), ("role", 1), ("answer", 6)]
COUNTED = {
    "all": {"role", "picture", "question", "answer", "padding"},
    "unpadded": {"role", "picture", "question", "answer"},
    "text": {"role", "question", "answer"},
    "response": {"answer"},
}


def rows(counted, *layouts):
    width = max(sum(count for _, count in layout) for layout in layouts)
    kinds = [[kind for kind, count in layout for _ in range(count)] for layout in layouts]
    return [[float(kind in counted) for kind in row + ["padding"] * (width - len(row))] for row in kinds]


@pytest.fixture
def encoder():
    return Encoder(embedded_model.make_processor(embedded_model.make_tokenizer()))


@pytest.mark.parametrize("which", COUNTED)
def test_positions_are_those_of_the_kinds_that_count(encoder, tmp_path, which):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    shown = Sample("a", str(tmp_path / "a.png"), "what colour is it", "it is", True, "", "t")
    text_only = Sample("b", None, "tell the code", "it is the colour red", True, "", "t")
    mask_BS = positions(encoder.encode([shown, text_only]), which)
    assert mask_BS.tolist() == rows(COUNTED[which], SHOWN, TEXT_ONLY)


@pytest.mark.parametrize("which", COUNTED)
def test_the_hidden_picture_of_a_batch_without_any_counts_as_padding(encoder, which):
    text_only = Sample("b", None, "tell the code", "it is the colour red", True, "", "t")
    mask_BS = positions(encoder.encode([text_only]), which)
    assert mask_BS.tolist() == rows(COUNTED[which], [*TEXT_ONLY, ("padding", 16)])
