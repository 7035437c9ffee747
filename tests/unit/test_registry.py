"""A name in a recipe is one of ours or `module:Class` from outside; whatever it is not, the error says what exists."""

import sys

import pytest

from mirage_dist.evals import attacks
from mirage_dist.objectives.base import REGISTRY, make
from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError

OUTSIDE = """
from dataclasses import dataclass
from mirage_dist.schema import ConfigError

@dataclass
class Mine:
    weight: float = 1.0

    def __post_init__(self):
        if self.weight < 0:
            raise ConfigError(f"weight={self.weight}; must be >= 0")

@dataclass
class Odd:
    sizes: tuple[int, ...] = ()

@dataclass
class Unnamed:
    weight: "Undefined" = 0

number = 3
"""
THINGS = Registry("thing", "name", {"ours": "collections:Counter"})


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A package in the working directory, as a lab has one."""
    folder = tmp_path / "registry_lab"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "things.py").write_text(OUTSIDE)
    (folder / "broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield folder
    for name in [n for n in sys.modules if n.startswith("registry_lab")]:
        del sys.modules[name]


def test_a_class_in_the_working_directory_is_made_with_its_options(lab):
    made = THINGS.make({"name": "registry_lab.things:Mine", "weight": 0.5}, "recipe.yaml", "thing")
    assert type(made).__name__ == "Mine"
    assert made.weight == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "registry_lab.things:Mine", "wieght": 1}, ["recipe.yaml: ", "thing.wieght", "'weight'"]),
        ({"name": "registry_lab.things:Mine", "weight": -1}, ["recipe.yaml: thing.weight=-1", ">= 0"]),
        ({"name": "registry_lab.things:Yours"}, ["thing.name='registry_lab.things:Yours'", "no attribute 'Yours'"]),
        ({"name": "registry_lab.absent:Mine"}, ["No module named 'registry_lab.absent'", "module:Class"]),
        ({"name": "registry_lab.broken:Mine"}, ["No module named 'no_such_module_at_all'"]),
        ({"name": "registry_lab.things:number"}, ["number is not a class"]),
        ({"name": "registry_lab.things:Odd", "sizes": [1]}, ["recipe.yaml: thing.sizes", "tuple[int, ...]", "a list"]),
        ({"name": "registry_lab.things:Unnamed"}, ["recipe.yaml: thing", "Unnamed", "'Undefined' is not defined"]),
        ({"name": "registry_lab.things"}, ["unknown thing", "ours", "module:Class"]),
        ({"name": None}, ["thing.name=None", "ours", "module:Class"]),
        ({}, ["thing.name=None", "ours", "module:Class"]),
    ],
)
def test_what_cannot_be_made_is_named_with_its_key(lab, options, words):
    with pytest.raises(ConfigError) as error:
        THINGS.make(options, "recipe.yaml", "thing")
    assert all(word in str(error.value) for word in words), error.value


def test_an_unknown_objective_or_attack_lists_all_there_are():
    with pytest.raises(ConfigError) as error:
        make({"name": "wasserstein"}, "recipe.yaml")
    assert all(name in str(error.value) for name in REGISTRY)
    assert "did you mean" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        attacks.make({"kind": "lottery"}, "recipe.yaml", "sets.unsafe.attacks.x")
    assert all(name in str(error.value) for name in attacks.REGISTRY)


def test_a_misspelt_name_is_suggested_beside_the_list():
    with pytest.raises(ConfigError, match="did you mean 'graddiff'") as error:
        make({"name": "gradiff"}, "recipe.yaml")
    assert "rmu" in str(error.value)


def test_every_registered_class_can_be_imported():
    for registry in (REGISTRY, attacks.REGISTRY):
        for name in registry:
            assert registry.load(name, "recipe", "key").__module__.startswith("mirage_dist.")
