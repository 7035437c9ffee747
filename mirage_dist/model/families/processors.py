"""Loading a processor, or a text-only model's tokenizer: one place for training, evaluation, judges and engines.

transformers needs torchvision for every processor that can also prepare videos. Without torchvision, such a processor
is put together from its other parts: it prepares pictures, with transformers' PIL classes, and no videos.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirage_dist.data.encoding import templates
from mirage_dist.data.encoding.conversation import template_of, tokenizer_of
from mirage_dist.model import directory
from mirage_dist.model.families import configs, roles
from mirage_dist.schema import ConfigError

INPUTS, VERSIONS = "init_inputs", "fast_tokenizer_files"
VOCABULARY = ("vocab", "merges")  # keys of a tokenizer's settings: contents, or the file that has them
# Files that name a processor's class, in the order in which transformers reads them.
NAMING = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load(folder: Path) -> Any:
    """The processor of a model directory, or the tokenizer of a text-only model.

    Raises ConfigError when it cannot be loaded: the directory needs remote code, lacks a file, or is no model; its
    files name others outside it; a package is missing; or the chat template exceeds a bound (see `encoding.templates`).
    """
    config = configs.load(folder)
    _check_places(folder)
    processor = _loaded(folder, config)
    templates.check(folder, tokenizer_of(processor), template_of(processor), tokenizer_of(processor) is processor)
    return processor


def _check_places(folder: Path) -> None:
    """Raise ConfigError when a tokenizer's settings name a file that is not among those that are hashed.

    transformers opens some of these names as they are. Published files name places of the machine that wrote them;
    where these do not exist they are harmless.
    """
    own = {os.path.realpath(file) for file in directory.files(folder)}
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        content = configs.read(file) if file.is_file() else {}
        named = {name: value for name, value in content.items() if name.endswith("_file") or name in VOCABULARY}
        named |= {"init_inputs": content["init_inputs"]} if content.get("init_inputs") else {}
        named |= (
            {"fast_tokenizer_files": content["fast_tokenizer_files"]} if content.get("fast_tokenizer_files") else {}
        )
        for name, value in named.items():
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str) and _is_foreign(folder, place, own, name):
                    raise ConfigError(
                        f"{file}: {name} names {place[:200]!r}, which is no tokenizer's file of this directory; "
                        f"take {name} out"
                    )


def _is_foreign(folder: Path, place: str, own: AbstractSet[str], name: str) -> bool:
    base = folder if name == VERSIONS else Path()  # others are opened where the process works
    try:
        return (base / place).is_file() and os.path.realpath(base / place) not in own
    except (OSError, ValueError):  # a text that is no path
        return False


def _loaded(folder: Path, config: Any) -> Any:
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils.import_utils import is_torchvision_available

    try:
        if roles.text_only(config):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except configs.FAULTS as error:  # not ImportError alone: transformers fails in several ways without torchvision
            if is_torchvision_available() and not isinstance(error, ImportError):
                raise
            processor = _without_torchvision(folder, config)
    except ConfigError:
        raise
    except Exception as error:  # of any kind: the libraries of tokenizers raise plain Exception
        raise _refusal(folder, error) from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            f"model.path={folder}: {config.model_type} takes pictures, but this directory gives only a "
            f"{type(processor).__name__}; copy the files of its processor (preprocessor_config.json or "
            "processor_config.json, tokenizer files) from the original model"
        )
    # Some directories name their template for the tokenizer only (tokenizer_config.json).
    processor.chat_template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    return processor


def _refusal(folder: Path, error: Exception) -> ConfigError:
    """The error for a processor that transformers cannot load, with the package to install where one is missing."""
    from transformers.utils.import_utils import is_torchvision_available

    package = None
    if "torchvision" in str(error).lower() and not is_torchvision_available():
        package = "torchvision"  # a family with no image processor for PIL
    elif isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
    if package is not None:
        return ConfigError(f"model.path={folder}: its processor needs the package {package}: pip install {package}")
    if configs.names_remote_code(folder):
        return configs.remote_code(folder, "processor")
    return ConfigError(f"model.path={folder}: its processor cannot be loaded: {configs.brief(error)}")


def _without_torchvision(folder: Path, config: Any) -> Any:
    """The processor, with the settings of its video processor in that one's place.

    Raises ImportError where it needs a package that is missing.
    """
    real = _real_class(_class_name(folder, config))
    _name_missing_packages(sys.modules[real.__module__])
    attributes: list[str] = real.get_attributes()
    others = [name for name in attributes if name != "video_processor"]
    pictures_only = type(real.__name__, (real,), {"get_attributes": classmethod(lambda _: others)})

    def parts(_: Any, path: Any, settings: Any = None, **options: Any) -> list[Any]:
        loaded = dict(zip(others, pictures_only._get_arguments_from_pretrained(path, settings, **options), strict=True))
        videos = _video_settings(folder, loaded.get("image_processor"))
        return [loaded.get(name, videos) for name in attributes]

    def proper(self: Any, name: str, value: Any) -> Any:
        return None if name == "video_processor" else real.check_argument_for_proper_class(self, name, value)

    changed = {
        "__module__": real.__module__,
        "get_attributes": classmethod(lambda _: attributes),
        "_get_arguments_from_pretrained": classmethod(parts),
        "check_argument_for_proper_class": proper,
    }
    return type(real.__name__, (real,), changed).from_pretrained(folder, local_files_only=True)


def _class_name(folder: Path, config: Any) -> str:
    """The name of the class of a directory's processor. Raises ValueError when neither files nor config name one."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    for file in (folder / name for name in NAMING):
        if file.is_file() and (name := configs.read(file).get("processor_class")):
            return name
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"no file names its class, and transformers knows none for {config.model_type}")
    known: Any = PROCESSOR_MAPPING[type(config)]
    return known.__name__


def _real_class(name: str) -> Any:
    """A processor class of transformers, also where transformers puts a placeholder because torchvision is missing."""
    import transformers

    listed: Any = getattr(transformers, name, None)
    if listed is None:
        raise ValueError(f"transformers {transformers.__version__} has no class {name}")
    if not getattr(listed, "is_dummy", False):
        return listed
    # A placeholder bears the name of the module of the real class.
    with _pil_modules(listed.__module__.rpartition(".")[0]):
        return getattr(importlib.import_module(listed.__module__), name)


@contextmanager
def _pil_modules(package: str) -> Iterator[None]:
    """While modules of a family's package are imported, its PIL image processing stands where torchvision's is named.

    Some processors import a function of sizes from the torchvision module; the PIL module has the same.
    """
    family = package.rpartition(".")[2]
    place = f"{package}.image_processing_{family}"
    if importlib.util.find_spec(f"{package}.image_processing_pil_{family}") is None or place in sys.modules:
        yield
        return
    sys.modules[place] = importlib.import_module(f"{package}.image_processing_pil_{family}")
    try:
        yield
    finally:
        del sys.modules[place]


def _name_missing_packages(module: Any) -> None:
    """Let a processor be made without the optional packages of its module (SmolVLM's writes out a number of frames).

    Such a module holds None for a package's function where `is_PACKAGE_available` is false. In its place comes a
    function that raises ConfigError with the package's name.
    """
    for name, value in list(vars(module).items()):
        if value is None and f"is_{name}_available" in vars(module):
            setattr(module, name, _missing(name))


def _missing(package: str) -> Any:
    def missing(*_: Any, **__: Any) -> None:
        raise ConfigError(f"this input needs the package {package}: pip install {package}")

    return missing


def _video_settings(folder: Path, images: Any) -> Any:
    """What a processor reads from its video processor: the saved settings, or those of its image processor.

    It has no frames to prepare, since no input here is a video.
    """
    from transformers.models.auto.video_processing_auto import get_video_processor_config
    from transformers.video_processing_utils import VideoProcessorMixin

    kind = type("VideoSettings", (VideoProcessorMixin,), {"model_input_names": []})
    shared = images.to_dict() if images is not None else {}
    return kind(**{**shared, **get_video_processor_config(folder, local_files_only=True)})
