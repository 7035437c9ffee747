"""The tiny models are whole models of the classes that they name, in the published layout."""

import json

import pytest
from transformers import AutoConfig

from families import models, parts
from mirage_dist.model.families import roles


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_weight_of_the_named_class_comes_from_the_files(name, family):
    folder = family(name)
    published = json.loads((folder / "config.json").read_text())
    loader = roles.auto_class(AutoConfig.from_pretrained(folder))
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == published["architectures"][0]
    assert not any(report.values())
    assert len(roles.decoder(model).layers) == parts.LAYERS
