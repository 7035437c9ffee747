"""Published files that are cut off, that lack their answers, or that are another suite's under the same name."""

import json
from pathlib import Path

import pytest
import test_benchmarks as own
import test_short_answers as short
import yaml
from lookalike import safe, unsafe
from PIL import Image

from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, sources
from mirage_dist.schema import ConfigError

files = own.files  # the fixture
pope, mme, gqa = short.pope, short.mme, short.gqa

# ------------------------------------------------------------------------------------------- annotations

OFFICIAL = {
    "vqav2": r"v2_mscoco_val2014_annotations\.json, published at visualqa\.org",
    "textvqa": r"TextVQA_0\.5\.1_val\.json, published at textvqa\.org",
    "vizwiz": r"val\.json of Annotations\.zip, published at vizwiz\.org",
    "scienceqa": r"problems\.json, published at scienceqa\.github\.io",
    "gqa": r"testdev_balanced_questions\.json of questions1\.2\.zip, published at",
    "pope": r"the folder of coco_pope_\{adversarial,popular,random\}\.json, output/coco of the repository AoiDragon/",
    "mme": r"the folder MME_Benchmark_release_version, which MME's authors give on request",
}


def test_every_format_with_answers_of_their_own_is_tested_here():
    classes = {name: formats.load(name, "test", "format") for name in formats.REGISTRY}
    assert {name for name, cls in classes.items() if "annotations" in cls.__dataclass_fields__} == set(OFFICIAL)


@pytest.mark.parametrize("name", OFFICIAL)
def test_missing_annotations_are_named_with_the_place_where_they_are_published(files, name):
    path = files("questions.jsonl", own.llava(7, image="VizWiz_val_00000000.jpg"))
    config = formats.source(name, path, annotations="nowhere/answers.json")
    with pytest.raises(
        ConfigError,
        match=rf"annotations: nowhere/answers\.json: nothing is there; format={name} expects {OFFICIAL[name]}",
    ):
        sources.read(config, check_images=False)


@pytest.mark.parametrize("name", OFFICIAL)
def test_llavas_questions_alone_say_which_answers_they_lack(files, name):
    path = files("questions.jsonl", own.llava(7, image="VizWiz_val_00000000.jpg"))
    if formats.load(name, "test", "format").required:
        with pytest.raises(
            ConfigError, match=rf"annotations: format={name} needs the official answers: {OFFICIAL[name]}"
        ):
            formats.source(name, path)
        return
    with pytest.raises(
        ConfigError,
        match=rf"questions\.jsonl: LLaVA's questions have no answers; `annotations` is missing: {OFFICIAL[name]}",
    ):
        sources.read(formats.source(name, path), check_images=False)


# ----------------------------------------------------------------------------------------------- names


def test_no_two_formats_of_the_recipes_want_one_file():
    """What a newcomer downloads for one suite never stands where another's file should be."""
    wanted: dict[str, set[str]] = {}
    for file in sorted((REPOSITORY / "configs").glob("*/*.yaml")):
        for source in listed(yaml.safe_load(file.read_text())):
            for key in ("path", "annotations", "tiny"):
                if str(source.get(key)).startswith("data/"):
                    wanted.setdefault(source[key], set()).add(source["format"])
    assert {path: names for path, names in wanted.items() if len(names) > 1} == {}
    assert len(wanted) > 15


def listed(tree: object) -> list[dict]:
    """Every source in a recipe."""
    if isinstance(tree, list):
        return [source for part in tree for source in listed(part)]
    if not isinstance(tree, dict):
        return []
    if {"format", "path"} <= tree.keys():
        return [tree]
    return [source for part in tree.values() for source in listed(part)]


VLGUARD = [safe("s", "a.png", "What?", "A gadget.", "Describe it.", "No."), unsafe("u", "a.png", "Share it.")]
VIZWIZ = own.vizwiz_records()
ERASER = [{"image_id": "a.png", "unsafe_pairs": []}]


@pytest.mark.parametrize(
    ("format", "records", "actual"),
    [
        ("vizwiz", VLGUARD, "vlguard"),
        ("vlguard", VIZWIZ, "vizwiz"),
        ("vlguard", ERASER, "safe_eraser"),
        ("safe_eraser", VLGUARD, "vlguard"),
        ("vlguard", own.llava(1), None),
        ("spa_vl", VLGUARD, "vlguard"),
        ("samples", [{"conversations": []}], "llava"),
    ],
)
def test_another_suites_file_of_the_same_name_is_recognised(files, format, records, actual):
    """VLGuard, VizWiz and others publish a test.json or a val.json each."""
    with pytest.raises(ConfigError) as error:
        sources.read(formats.source(format, files("test.json", records)), check_images=False)
    assert "test.json: record 0: " in str(error.value)
    named = f"; its fields are those of {actual}, not of {format}"
    assert (named in str(error.value)) == (actual is not None)
    assert ("its fields are" in str(error.value)) == (actual is not None)


# ----------------------------------------------------------------------------------------------- cut off


def whole(files, name: str, root: Path) -> tuple[Path, formats.Format]:
    """A published file and a source that reads it."""
    Image.new("RGB", (2, 2)).save(root / "a.png")
    match name:
        case "vlguard":
            path = files("test.json", VLGUARD)
            return Path(path), formats.source("vlguard", path)
        case "figstep":
            rows = [[*own.TEA[:2], str(i), "Kitchen", "How, and why?", f"Steps to brew, number {i}."] for i in range(5)]
            path = own.figstep_csv(root, rows)
            return Path(path), formats.source("figstep", path, variant="text_only")
        case "mm_safetybench":
            path = files("01-Scenario.json", own.safetybench("x"))
            return Path(path), formats.source("mm_safetybench", path, variant="text_only")
        case "safe_eraser":
            path = files("all_val.json", [{"image_id": "a.png", "unsafe_pairs": [{"question": "How?"}]}])
            return Path(path), formats.source("safe_eraser", path)
        case "vqav2 answers":
            path = files("annotations.json", own.vqav2_annotations(7, 8))
            return Path(path), formats.source("vqav2", files("q.json", own.vqav2_questions(7)), annotations=path)
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["vlguard", "figstep", "mm_safetybench", "safe_eraser", "vqav2 answers"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_a_published_file_that_is_cut_off_is_an_error_that_names_it(files, tmp_path, name, share):
    """The CSV's last field is in quotes, so that its end is known."""
    path, config = whole(files, name, tmp_path)
    assert sources.read(config, check_images=False).samples
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ConfigError, match=path.name):
        sources.read(config, check_images=False)


@pytest.mark.parametrize("name", ["pope", "mme", "gqa"])
def test_question_files_and_answers_that_are_cut_off_are_errors_that_name_them(name, request):
    root = request.getfixturevalue(name)
    places = {
        "pope": ("llava_pope_test.jsonl", "coco/coco_pope_random.json"),
        "mme": ("llava_mme.jsonl", "MME_Benchmark_release_version/code_reasoning/0020.txt"),
        "gqa": ("llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"),
    }[name]
    annotations = {"pope": "coco", "mme": "MME_Benchmark_release_version", "gqa": places[1]}[name]
    config = formats.source(name, str(root / places[0]), str(root), annotations=str(root / annotations))
    assert sources.read(config, check_images=False).samples
    for place in places:
        content = (root / place).read_bytes()
        (root / place).write_bytes(content[: len(content) // 2])
        with pytest.raises(ConfigError, match=Path(place).name):
            sources.read(config, check_images=False)
        (root / place).write_bytes(content)


def test_official_answers_may_be_larger_than_other_files_of_one_value(files, tmp_path):
    """VQAv2's have 170 MB; 64 MiB is the limit of recipes' own files."""
    path = Path(files("annotations.json", own.vqav2_annotations(7)))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"padding": "x" * (65 << 20), **content}))
    config = formats.source("vqav2", files("q.json", own.vqav2_questions(7)), annotations=str(path))
    assert len(sources.read(config, check_images=False).samples) == 1
