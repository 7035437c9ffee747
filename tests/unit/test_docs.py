"""Every command that the pages and the headers of scripts and recipes show is one that works as written."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY, provenance
from mirage_dist.data import prepare
from mirage_dist.erasure import run as erasure_tests
from mirage_dist.evals import worklist
from mirage_dist.paper import chain as chains
from mirage_dist.paper.recipe import PaperRecipe
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe
from mirage_dist.sweep import points
from mirage_dist.sweep.recipe import SweepRecipe
from mirage_dist.train.planning import check

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
HEADERS = [*sorted((REPOSITORY / "slurm").glob("*.sh")), *sorted((REPOSITORY / "configs").glob("*/*.yaml"))]
COMMAND = re.compile(r"(?:(?:\w+=\S*|sudo) )*(?:sbatch|mirage|launch/local\.sh \d+|slurm/pipeline\.sh)(?: |$)")
# What a page writes for something of the reader's.
STANDS_FOR = {
    "OUT": "out",
    "DIR": "out",
    "RUN": "runs/npo",
    "DATA": "data.json",
    "WORLD": "world",
    "SUITE": "vlguard",
    "N": "2",
    "I/N": "0/2",
    "FORM": "merged",
}
DEFAULTS = {
    "train": "configs/train/npo.yaml",
    "plan": "configs/train/npo.yaml",
    "prepare": "configs/prepare/vlguard.yaml",
    "paper": "configs/paper/llava_1_5_7b.yaml",
    "sweep": "configs/sweep/demo.yaml",
}
EVALUATION = "configs/eval/vlguard.yaml"
GLOBAL = "train.global_batch"


def code(file: Path) -> Iterator[str]:
    """The lines of a page's blocks of code, each with those that continue it, and its code within sentences."""
    text = file.read_text().replace("\\\n#", "\\\n")
    text = re.sub(r"\\\n\s*", "", text)
    if file in HEADERS:
        yield from re.findall(r"^#   (.+)$", text, re.MULTILINE)
        return
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (line for block in blocks for line in block.splitlines())
    yield from re.findall(r"^    (\S.*)$", sentences, re.MULTILINE)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", sentences))


def commands(file: Path) -> Iterator[list[str]]:
    """The words of every command, without what stands for further words."""
    variables: dict[str, str] = {}
    for line in code(file):
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[assigned[1]] = assigned[2]
        line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)
        if not COMMAND.match(line):
            continue
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], "1"), line)
        line = re.sub(r" \[[^\]=]*(?:key=value[^\]]*)?\]", "", line)
        for part in re.split(r"   or   ", line):
            words = [word.replace("=…", "=x").rstrip("…") for word in shlex.split(part, comments=True)]
            words = [STANDS_FOR.get(word, word) for word in words if word not in ("", "key=value")]
            yield [word.replace("SUITE.yaml", "vlguard.yaml") for word in words]


CASES = [(file, words) for file in (*PAGES, *HEADERS) for words in commands(file)]
assert len(CASES) > 80


@pytest.mark.parametrize(
    ("file", "words"), CASES, ids=[f"{file.relative_to(REPOSITORY)}: {' '.join(w)}"[:100] for file, w in CASES]
)
def test_a_command_works_as_it_is_written(file: Path, words: list[str]):
    environment = {}
    while "=" in words[0] or words[0] == "sudo":
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program, *words = words
    if program == "mirage":
        verb(words, None)
    elif program == "launch/local.sh":
        verb(words[1:], int(words[0]))
    elif program == "sbatch":
        submitted(words, environment)
    elif words and words[0] in ("sft", "npo", "rmu"):
        chain(*words)


def verb(words: list[str], ranks: int | None) -> None:
    """Parse a command line of `mirage`, and check its recipe for a number of processes."""
    if len(words) < 2:  # the mention of a verb
        with pytest.raises(SystemExit) as ended:
            cli.parse([*words, "--help"])
        assert not ended.value.code
        return
    own = DEFAULTS.get(words[0], EVALUATION)
    words = [own if word in ("CONFIG", "RECIPE") else word for word in words]
    if words[1:] == ["--check"]:  # the mention of a flag
        words.insert(1, own)
    parsed = cli.parse(words)
    if "config" not in parsed or any("my_lab" in word for word in words):
        return
    if words[0] == "paper":
        file = "configs/paper/tiny.yaml" if parsed.scale else parsed.config
        for link in chains.links(configs.load(file, parsed.overrides, PaperRecipe)):
            link.load()
        return
    if words[0] == "show":
        assert provenance.values(parsed.config, parsed.overrides)
        return
    if words[0] == "sweep":
        points.plan(configs.load(parsed.config, parsed.overrides, SweepRecipe))
        return
    load = {"train": TrainRecipe, "plan": TrainRecipe, "prepare": PrepareRecipe}.get(words[0], EvalRecipe)
    recipe = configs.load(parsed.config, parsed.overrides, load)
    if isinstance(recipe, TrainRecipe):
        check.check_recipe(recipe, ranks or parsed.ranks or 1)
    elif isinstance(recipe, PrepareRecipe):
        prepare.check(recipe)
    else:
        worklist.check(recipe)
        if words[0] == "erasure":
            erasure_tests.options(recipe)


def submitted(words: list[str], environment: dict[str, str]) -> None:
    """Check the recipe of `sbatch WORDS` for the number of processes that the job would have."""
    place = next((i for i, word in enumerate(words) if word.endswith(".sh")), None)
    if place is None:
        assert any(word.startswith(("--wrap", "--test-only")) for word in words)
        return
    script = REPOSITORY / words[place]
    header = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    options = [*header, *re.split(r" (?=-)", " ".join(words[:place]))]
    given = dict(re.split(r"[= ]", option, maxsplit=1) for option in options if re.search(r"[= ]", option))
    of_node = given["--gres"].rpartition(":")[2] if "MIRAGE_LAUNCHER" in environment else given["--ntasks-per-node"]
    run = re.search(r"^run_recipe (\w+) (\S+)", script.read_text(), re.MULTILINE)
    own_verb = re.search(r"^run ([a-z]\w*) ", script.read_text(), re.MULTILINE)
    words = [*([own_verb[1]] if own_verb else []), *words[place + 1 :]]
    if run is None:
        verb(words, None)
    else:
        own = words if words and words[0].endswith(".yaml") else [run[2], *words]
        verb([run[1], *own], int(given["--nodes"]) * int(of_node))


def chain(objective: str, *words: str) -> None:
    """Check train's recipe of `slurm/pipeline.sh`; the script itself checks the other links (tests/slurm)."""
    own = [
        word.removeprefix("train:") for word in words if re.match(r"(?!harvest:|prepare:|eval:|report:|skip:)", word)
    ]
    options, overrides = [w for w in own if w.startswith("--")], [w for w in own if not w.startswith("--")]
    script = "slurm/sft.sh" if objective == "sft" else f"slurm/unlearn_{objective}.sh"
    submitted([*options, script, *overrides], {})


@pytest.mark.parametrize(
    ("batch", "ranks", "ways"),
    [
        (
            (16, 2),
            32,
            "8 processes in place of 32, or train.global_batch=64, or train.micro_batch=1 with train.global_batch=32",
        ),
        ((16, 2), 16, f"8 processes in place of 16, or train.micro_batch=1, or {GLOBAL}=32"),
        ((128, 4), 24, f"16 processes in place of 24, or {GLOBAL}=96 or {GLOBAL}=192"),
        ((6, 4), 2, f"train.micro_batch=3, or {GLOBAL}=8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_ways_out(batch, ranks, ways):
    rows, micro = batch
    overrides = [f"train.global_batch={rows}", f"train.micro_batch={micro}"]

    def checked(*more: str, processes: int = ranks) -> None:
        check.check_recipe(configs.load("configs/train/npo.yaml", [*overrides, *more], TrainRecipe), processes)

    with pytest.raises(ConfigError) as error:
        checked()
    assert f"must be a multiple of train.micro_batch × world size ({micro} × {ranks}); take {ways} (" in str(
        error.value
    )
    for way in re.split(r", or | or ", ways):
        count = re.match(r"(\d+) process", way)
        checked(*([] if count else way.split(" with ")), processes=int(count[1]) if count else ranks)


def test_mirage_config_prints_values_and_overrides_that_read_back(capsys):
    words = ["config", "configs/train/npo.yaml", 'run.dir="it\'s $x = é"', "data.template_options={b: [1], a: null}"]
    keys = ["--get", "run.dir", "--get", "data.template_options", "--get", "world", "--override", "run.dir"]
    assert cli.main([*words, *keys]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["it's $x = é", '{"a": null, "b": [1]}', "null", 'run.dir="it\'s $x = é"']
    assert configs.load(words[1], [printed[3]], TrainRecipe).run.dir == printed[0]
    assert cli.main([*words, "--get", "run.dri"]) == 2
    assert "did you mean 'dir'?" in capsys.readouterr().err
    assert cli.main([*words, "--get", f"data.streams.forget[{'9' * 5000}]"]) == 2
    assert cli.main(["config", "configs/eval/vlguard.yaml", 'suite="a\\nb"', "--get", "suite"]) == 2


def test_recipes_are_checked_alone_by_every_verb_that_a_chain_has(capsys):
    """Neither the data nor the models of these recipes exist here."""
    for words in (
        ["train", "configs/train/sft.yaml", "--check-recipe", "--ranks", "32"],
        ["prepare", "configs/prepare/vlguard.yaml", "--check"],
        ["eval", "configs/eval/harvest.yaml", "--check"],
    ):
        assert cli.main(words) == 0, capsys.readouterr().err
    assert "in order for 32 processes; neither data nor model were read" in capsys.readouterr().out
    for words, message in (
        (["train", "configs/train/sft.yaml", "--check-recipe", "--ranks", "33"], "take 32 processes in place of 33"),
        (["prepare", "configs/prepare/vlguard.yaml", "--check", "harvest=null"], "harvest is missing"),
        (["eval", "configs/eval/harvest.yaml", "--check", "generation.backend=tgi"], "unknown generation backend"),
    ):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
