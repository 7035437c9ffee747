"""Templates are filled in one pass, and replace their own placeholders only; texts that cannot be encoded."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import config
from mirage_dist.data.sample import Sample
from mirage_dist.data.words import fill_template
from mirage_dist.evals import attacks
from mirage_dist.evals.judges.parity import PublishedParity
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.schema.texts import check_template, fault, fill

words = st.text("ab{}!.:0 ") | st.sampled_from(["{question}", "{answer}", "{rest}", "{{", "{question.__class__}"])


@given(words, words)
def test_a_value_stands_in_the_text_as_it_is_whatever_braces_it_holds(question, answer):
    assert fill("Q: {question} A: {answer} Q: {question}", question=question, answer=answer) == (
        f"Q: {question} A: {answer} Q: {question}"
    )
    assert fill('{{"a": {answer}}}', answer=answer) == '{"a": ' + answer + "}"


REACHING = [
    "{question.__class__}",
    "{question[0]}",
    "{question!r:>1000000}",
    "{question:>1000000}",
    "{0}",
    "{}",
    "{answer}",
    "{question",
    "question}",
    "{ question }",
    "{{question}",
]


@pytest.mark.parametrize("template", REACHING)
def test_a_template_reaches_no_attribute_index_or_other_name(template):
    with pytest.raises(ConfigError, match=r"templates: .*use \{rest\} or \{question\}, and nothing else in braces"):
        check_template(f"What {template}", ("rest", "question"), "templates")
    for options in (
        {"kind": "templates", "word": "what", "templates": [f"What {template}"]},
        {"kind": "prefix", "prefixes": [f"what {template} then"]},
        {"kind": "suffix", "target": f"{template} {{question}}"},
    ):
        with pytest.raises(ConfigError, match=r"templates|prefixes|target"):
            attacks.make(options, "recipe", "attack")


def sample(question, answer="An answer."):
    return Sample("a", None, question, answer, True, "", "t.json")


QUESTIONS = ["Share {question} and {rest}.", "List {answer} {question!r} {{0}}"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_with_a_placeholder_is_never_put_into_itself(question):
    rest = question.split(" ", 1)[1]
    assert fill_template("What {rest} / {question}", sample(question)) == f"What {rest} / {question}"
    prefix = attacks.make({"kind": "prefix", "prefixes": ["what {question}"]}, "recipe", "attack")
    assert [s.question for s in prefix(sample(question))] == [f"what {question}"]
    judge = PublishedParity(url="http://localhost:1/v1", model="m")
    row = {"response": question + " {question}", "image": None}
    text = judge._prompt(row, question).text
    assert text.startswith(f"Question: {question}\n\nAnswer: {question} {{question}}\n\n")
    assert fill("Sure: {answer}", answer=question) == f"Sure: {question}"


def test_a_judges_own_prompts_are_checked_as_a_recipe_is(tmp_path):
    file = tmp_path / "prompts.json"
    texts = {"clean": "c", "attacked": "a", "question": "{question} {answer.__class__}"}
    for content, message in (
        (texts, r"'question'.*nothing else in braces"),
        ({**texts, "question": "{answer}"}, "hold"),
    ):
        file.write_text(json.dumps(content), encoding="utf-8-sig")
        with pytest.raises(ConfigError, match=message):
            _ = PublishedParity(url="http://localhost:1/v1", model="m", prompts=str(file)).texts


@pytest.mark.parametrize("text", ["\ud83d", "a\udcff", "\udc00\ud800"])
def test_half_a_surrogate_pair_cannot_be_encoded_and_is_an_error_in_a_recipe(text):
    assert "surrogate" in fault(text)
    assert fault("😀 \0 é") is None
    tree = {"run": {"dir": "r"}, "template": {"system_prompt": f"Be kind {text}"}}
    with pytest.raises(ConfigError, match=r"recipe\.yaml: field 'template\.system_prompt': holds half of a surrogate"):
        config.from_tree(config.OmegaConf.create(tree), [], EvalRecipe, "recipe.yaml")
