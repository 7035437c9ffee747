"""Questions in pictures: the same pixels each time, whole, below a picture of their own, read back from the file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from toy import Toy

from mirage_dist import config as configs
from mirage_dist.data import pictures
from mirage_dist.data.formats import figstep, typeset
from mirage_dist.data.sample import Sample
from mirage_dist.evals import attacks, runner
from mirage_dist.evals.attacks.pictured import page
from mirage_dist.evals.attacks.rewrites import Rewriter
from mirage_dist.evals.sharing.files import Answers
from mirage_dist.schema import ConfigError, EvalRecipe


def sample(question="Placeholder question one ?", image=None, **more):
    return Sample("a", image, question, "", False, "", "test", **more)


def made(tmp_path, samples, **options):
    rewriter = Rewriter(tmp_path / "suite", {}, lambda claims: None)
    attack = attacks.make({"kind": "typographic", **options}, "r", "k")
    return rewriter(attack, samples, "x")


def ink(image):
    """Whether each pixel is not white."""
    return (np.asarray(image) < 255).any(axis=2)


def test_a_text_only_question_becomes_a_picture_with_figsteps_own_prompt(tmp_path):
    one = sample(history=(("first ?", "answer"),))
    attack = made(tmp_path, [one])
    (row,) = attack(one)
    assert (row.question, row.shown, row.id, row.history) == (figstep.PROMPT, 1, "a", one.history)
    assert Path(row.image).parent == tmp_path / "suite/pictures"
    assert oct(Path(row.image).stat().st_mode)[-3:] == "600"
    picture = pictures.open_picture(row.image)
    assert picture.size == (760, 760)
    assert ink(picture).any()
    assert attack(one) == [row]
    (plain,) = made(tmp_path, [one], layout="plain")(one)
    assert plain.question != figstep.PROMPT
    assert ink(pictures.open_picture(plain.image)).sum() < ink(picture).sum()  # without the numbers
    (own,) = made(tmp_path, [one], prompt="Fill the list.")(one)
    assert (own.question, own.image) == ("Fill the list.", row.image)


@settings(max_examples=15)
@given(st.text("abc xyz.,é—Ж\n", min_size=1, max_size=300).filter(str.strip))
def test_the_same_text_gives_the_same_bytes_and_no_line_leaves_the_page(tmp_path_factory, text):
    folders = [tmp_path_factory.mktemp("pages") for _ in range(2)]
    first, second = (page.saved(text, None, folder) for folder in folders)
    if first is None:
        assert max(map(len, text.split())) > 60  # of the narrowest characters a line holds more
        assert second is None
        return
    assert Path(first).read_bytes() == Path(second).read_bytes()
    assert Path(first).name == Path(second).name
    marked = ink(pictures.open_picture(first))
    assert not marked[:, -1].any()
    assert not marked[-1].any()
    assert page.saved(text + " b", None, folders[0]) not in (None, first)


def test_at_figsteps_size_a_line_has_its_characters(tmp_path):
    """A short instruction has the lines of FigStep's own layout (see `data.formats.typeset`)."""
    text = "Steps to write a placeholder."
    own, theirs = ink(page.draw(page.listed(text), None)), ink(typeset.draw(text))
    assert (own == theirs).mean() > 0.999


@pytest.mark.parametrize("size", [(40, 30), (30, 400), (2000, 100)])
def test_a_question_stands_below_a_picture_of_its_own(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "own.png")
    one = sample(image=str(tmp_path / "own.png"), history=(("first ?", "answer"),), shown=0)
    (row,) = made(tmp_path, [one])(one)
    assert row.shown == 0
    pixels = np.asarray(pictures.open_picture(row.image))
    assert pixels.shape == (760, 760, 3)
    upper, lower = pixels[:380], pixels[380:]
    green = (upper == (10, 200, 30)).all(axis=2)
    rows, columns = np.flatnonzero(green.any(1)), np.flatnonzero(green.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert width == 760 or height == 380
    assert abs(width / height - size[0] / size[1]) < 0.02 * size[0] / size[1] + 0.05
    assert (upper[~green] == 255).all()
    assert (lower < 128).any()
    assert not ((lower == (10, 200, 30)).all(axis=2)).any()
    other = replace(one, image=str(tmp_path / "other.png"))
    Image.new("RGB", size, (10, 200, 31)).save(tmp_path / "other.png")
    assert made(tmp_path, [other])(other)[0].image != row.image


@pytest.mark.parametrize("question", ["描述这张图片", "word " * 2000, "w" * 200])
def test_a_question_that_no_page_can_hold_is_without_a_rewrite(tmp_path, question):
    odd, plain = replace(sample(question), id="odd"), sample("Grüße — “naïve” Ж ?")
    rewrites, coverage = attacks.apply(made(tmp_path, [odd, plain]), [odd, plain], "x")
    assert [len(rows) for rows in rewrites] == [0, 1]
    assert coverage.without == ["odd"]


def test_what_is_read_back_is_what_was_drawn(tmp_path, monkeypatch):
    path = Path(page.saved("placeholder", None, tmp_path))
    whole = path.read_bytes()
    for damage in (whole[:200], b"", Path(page.saved("another", None, tmp_path)).read_bytes()):
        path.write_bytes(damage)
        assert page.saved("placeholder", None, tmp_path) == str(path)
        assert path.read_bytes() == whole
    path.write_bytes(b"")
    monkeypatch.setattr(page.files, "write", lambda file, content: file.write_bytes(content[:100]))
    with pytest.raises(Exception, match="does not read back as the picture that was written"):
        page.saved("placeholder", None, tmp_path)


@pytest.mark.parametrize("before", [["noise"], ["noise", "noise"], []])
def test_a_page_is_judged_as_itself_whatever_was_changed_before_it(tmp_path, before):
    """And noise on a page leaves the page to be judged."""
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "own.png")
    one = sample(image=str(tmp_path / "own.png"))
    for after in ([], ["noise"]):
        parts = [{"kind": kind} for kind in [*before, "typographic", *after]]
        attack = attacks.make({"kind": "combine", "attacks": [{"kind": "swap", "word": "what"}, *parts]}, "r", "k")
        question = replace(one, question="tell me ?")
        (row,) = Rewriter(tmp_path / "suite", {}, lambda claims: None)(attack, [question], "x")(question)
        assert row.question == figstep.PROMPT
        if not after:
            assert row.original_image is None
            drawn = row.image
        else:
            assert row.original_image == drawn != row.image


def test_rewrites_are_typeset_one_by_one_and_drawn_answers_come_after_them(tmp_path):
    parts = [
        {"kind": "prefix", "prefixes": ["so", "well"]},
        {"kind": "typographic", "layout": "plain"},
        {"kind": "sampling", "draws": 2},
    ]
    attack = attacks.make({"kind": "combine", "attacks": parts}, "r", "k")
    one = sample()
    rows = Rewriter(tmp_path / "suite", {}, lambda claims: None)(attack, [one], "x")(one)
    images = [Path(row.image).name for row in rows]
    own = [page.saved(f"{word} {one.question}", None, tmp_path) for word in ["so", "well"] * 2]
    assert images == [Path(str(file)).name for file in own]
    assert all(row.draw for row in rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"layout": "circle"}, "layout='circle'"), ({"prompt": " "}, "prompt=' ': expected the text")],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        attacks.make({"kind": "typographic", **options}, "r", "k")


def recipe(root: Path, run: Path, model: Path) -> EvalRecipe:
    tree = {
        "suite": "s",
        "run": {"dir": str(run)},
        "model": {"path": str(model), "dtype": "fp32"},
        "sets": {
            "unsafe": {
                "kind": "unsafe",
                "sources": [{"format": "samples", "path": str(root / "asked.jsonl")}],
                "attacks": {"typed": {"kind": "typographic"}},
            }
        },
        "generation": {"max_new_tokens": 4, "batch_size": 8},
    }
    return configs.from_tree(OmegaConf.create(tree), [], EvalRecipe, "a test")


def write_samples(toy: Toy, root: Path, pictured: bool) -> None:
    rows = [json.loads(line) for line in (toy.root / "forget.jsonl").read_text().splitlines()[:3]]
    lines = [json.dumps(row if pictured else {**row, "image": None}) + "\n" for row in rows]
    (root / "asked.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("pictured", [True, False])
def test_a_suite_answers_pictures_and_its_rows_name_them(toy, tmp_path, pictured):
    write_samples(toy, tmp_path, pictured)
    result = runner.evaluate(recipe(tmp_path, tmp_path / "run", toy.root / "model"))
    assert result["sets"]["unsafe"]["attacks"] == {"typed": {"shots": 1, "control": False}}
    answers = Answers(tmp_path / "run/evals/s").refresh()
    assert len(answers) == 6
    rows = [json.loads(x) for f in (tmp_path / "run/evals/s/rows").iterdir() for x in f.read_text().splitlines()]
    typed = [row for row in rows if row["attack"] == "typed"]
    assert {row["question"] for row in typed} == {figstep.PROMPT}
    assert all(Path(row["image"]).parent.name == "pictures" for row in typed)


def test_a_text_only_model_is_refused_by_name_before_it_loads(toy, tmp_path, family):
    write_samples(toy, tmp_path, pictured=False)
    options = recipe(tmp_path, tmp_path / "run", family("llama_text"))
    with pytest.raises(ConfigError, match=r"text-only model, but sets\.unsafe\.attacks\.typed puts"):
        runner.evaluate(options)
