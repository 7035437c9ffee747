"""With Vicuna's system prompt our row of one turn is LLaVA-1.5's own, byte by byte; of two turns one space differs.

Official: conv_vicuna_v1 and `get_prompt` in llava/conversation.py, `preprocess_multimodal` and `preprocess_v1` in
llava/train/train.py (haotian-liu/LLaVA): the system prompt and a space, then "USER: QUESTION ASSISTANT: ANSWER</s>" for
each turn, with "<image>" and a new line before the question that shows the picture.
"""

import published_recipes
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.pre_tokenizers import Split

from mirage_dist import config as configs
from mirage_dist.data.encoding.collate import IGNORE, Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.model.families import processors
from mirage_dist.schema import EvalRecipe, TrainRecipe

TEXTS = [
    "What is in this picture?",
    "Share two lines.\nThen one more",
    "It is red.",
    "I'm sorry, I can't help with that.",
    "1",
]
turns = st.lists(st.tuples(st.sampled_from(TEXTS), st.sampled_from(TEXTS)), min_size=1, max_size=3)


def official(conversation, shown: bool) -> str:
    """The text that LLaVA tokenises for training."""
    text = f"{published_recipes.VICUNA} "
    for number, (question, answer) in enumerate(conversation):
        picture = "<image>\n" if shown and number == 0 else ""
        text += f"USER: {picture}{question} ASSISTANT: {answer}</s>"
    return text


@pytest.fixture(scope="module")
def processor(family):
    """With a tokenizer of which, as of Llama's, no token goes on over a space."""
    made = processors.load(family("llava_llama"))
    made.tokenizer.backend_tokenizer.pre_tokenizer = Split("▁", "merged_with_next")
    return made


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (20, 12), "red").save(file)
    return str(file)


def encoder_of(processor) -> Encoder:
    """As the recipes set it up."""
    data = configs.load("configs/train/npo_parity.yaml", [], TrainRecipe).data
    return Encoder(processor, data.max_length, data.on_long, data.image_aspect, data.system_prompt)


def sample(conversation, image) -> Sample:
    *history, (question, answer) = conversation
    return Sample("a", image, question, answer, True, "", "t", tuple(history))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns, st.booleans())
def test_our_text_is_the_official_one_but_for_a_space_before_later_turns(processor, picture, conversation, shown):
    encoder = encoder_of(processor)
    text = "".join(encoder.conversation.pieces(sample(conversation, picture if shown else None), answered=True))
    assert text.replace("</s> USER: ", "</s>USER: ") == official(conversation, shown)
    assert text.count("</s> USER: ") == len(conversation) - 1
    assert (text == official(conversation, shown)) == (len(conversation) == 1)


@pytest.mark.parametrize("shown", [True, False])
def test_a_row_of_one_turn_has_the_official_tokens_and_labels(processor, picture, shown):
    encoder = encoder_of(processor)
    batch = encoder.encode([sample([TEXTS[0:4:3]], picture if shown else None), sample([TEXTS[:2]], picture)])
    length = int(batch.inputs["attention_mask"][0].sum())
    ids = batch.inputs["input_ids"][0, :length].tolist()
    mark = encoder.picture_token
    assert (ids.count(mark) > 1) == shown  # a token a patch; the official row has them in place of one mark
    collapsed = [token for place, token in enumerate(ids) if token != mark or ids[place - 1] != mark]
    expected = processor.tokenizer(official([TEXTS[0:4:3]], shown))["input_ids"]
    assert collapsed == expected
    labels = [label for label in batch.labels_BS[0, :length].tolist() if label != IGNORE]
    prompt = official([TEXTS[0:4:3]], shown).removesuffix(f" {TEXTS[3]}</s>")
    assert labels == expected[len(processor.tokenizer(prompt)["input_ids"]) :]
    assert processor.tokenizer.decode(labels) == f"{TEXTS[3]}</s>"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns)
def test_an_evaluation_asks_with_the_beginning_of_that_row(processor, picture, conversation):
    template = configs.load("configs/eval/vlguard.yaml", [], EvalRecipe).template
    asks = Encoder(
        processor, template.max_length, image_aspect=template.image_aspect, system_prompt=template.system_prompt
    )
    one = sample(conversation, picture)
    row = encoder_of(processor).encode([one])
    prompt = asks.prompts([one])["input_ids"][0].tolist()
    assert row.inputs["input_ids"][0, : len(prompt)].tolist() == prompt
    assert row.labels_BS[0, len(prompt)] != IGNORE
    text = "".join(asks.conversation.pieces(one, answered=False))
    assert text.endswith(f"{conversation[-1][0]} ASSISTANT:")
