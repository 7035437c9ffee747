"""The tests of erasure have one name: the key and the verb of earlier versions are errors that say the new one."""

import pytest

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.schema import ConfigError, EvalRecipe

RECIPE = "configs/eval/demo.yaml"


def test_the_old_key_in_a_recipe_names_the_new_one(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(configs.find(RECIPE).read_text().replace("\nerasure:", "\nrobustness:"))
    with pytest.raises(ConfigError, match=r"old\.yaml: 'robustness' is now called 'erasure'"):
        configs.load(file, [], EvalRecipe)


def test_the_old_key_in_an_override_names_the_new_one():
    with pytest.raises(ConfigError, match="'robustness' is now called 'erasure'"):
        configs.load(RECIPE, ["robustness.relearning=null"], EvalRecipe)


@pytest.mark.parametrize("words", [["robustness"], ["run.dir=x", "robustness", "seed=1"], ["robustness", "--status"]])
def test_the_old_word_after_eval_names_the_verb(words, capsys):
    assert cli.main(["eval", RECIPE, *words]) == ConfigError.status
    assert f"mirage erasure {RECIPE}" in capsys.readouterr().err
