"""What decides a model's outputs besides its files is known from the processor that this process would run."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from mirage_dist.data.pictures import REVISION
from mirage_dist.model import environment


@pytest.mark.parametrize(("backend", "torchvision"), [(PilBackend, False), (TorchvisionBackend, True)])
def test_the_version_of_torchvision_counts_where_it_resizes_pictures(monkeypatch, backend, torchvision):
    monkeypatch.setattr(environment, "version", lambda name: f"{name} 1")
    images = object.__new__(type("Images", (backend,), {}))
    own = environment.of(SimpleNamespace(image_processor=images))
    assert own.image_processor == "Images"
    assert ("torchvision" in own.libraries) == torchvision
    assert own.libraries["pillow"] == "pillow 1"
    assert own.libraries["pictures"] == REVISION


def test_a_tokenizer_alone_takes_no_pictures():
    alone = environment.of(SimpleNamespace())
    assert alone.image_processor is None
    assert alone.libraries == {name: version(name) for name in ("torch", "transformers")}
