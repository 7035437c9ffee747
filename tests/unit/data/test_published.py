"""Published data: what recipes read is in the catalogue, what is here is checked, what can be had is downloaded."""

import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from PIL import Image
from unit.data import lookalike

from mirage_dist import cli
from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats
from mirage_dist.data.published import catalogue, check, download, listing
from mirage_dist.data.published.catalogue import DATASETS, Dataset, File
from mirage_dist.schema import ConfigError, RunError


def test_the_page_is_the_catalogue():
    assert (REPOSITORY / "docs/get_data.md").read_text() == listing.page()


def places(tree: object) -> set[str]:
    """All paths under data/ in a recipe's sources."""
    if isinstance(tree, dict):
        return set().union(*map(places, tree.values())) if tree else set()
    if isinstance(tree, list):
        return set().union(*map(places, tree)) if tree else set()
    return {tree.removeprefix("data/")} if isinstance(tree, str) and tree.startswith("data/") else set()


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs").glob("*/*.yaml")), ids=lambda file: file.stem)
def test_whatever_a_recipe_reads_is_in_the_catalogue_or_made_here(file):
    """A newcomer finds every file that a recipe names: published, or made by a command of ours."""
    files = {one.path for dataset in DATASETS.values() for one in dataset.files}
    folders = {folder for dataset in DATASETS.values() for folder in dataset.pictures}
    ours = re.compile(r"prepared|sft|vlguard/diversified|figstep/typeset")
    named = places(yaml.safe_load(file.read_text()))
    assert {name for name in named - files - folders if not ours.match(name)} == set()


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=lambda dataset: dataset.name)
def test_an_entry_can_be_used(dataset):
    """Its sources are sources of a recipe, its files lie in their own folder, and each is had in one way at least."""
    for file in dataset.files:
        assert not Path(file.path).is_absolute()
        if file.source is not None:
            formats.make({**file.source, "path": file.path}, dataset.name, file.path)
        assert (file.counts == {}) or file.source is not None
    assert dataset.files or dataset.splits
    assert dataset.name in listing.page()
    assert dataset.page in listing.table()


# ----------------------------------------------------------------------------------------------------- check


@pytest.fixture
def root(tmp_path) -> Path:
    """VLGuard by its published names and counts, with pictures of a pixel each."""
    folder = tmp_path / "vlguard"
    for name, records in (("train", lookalike.train_records()), ("test", lookalike.test_records())):
        (folder / name).mkdir(parents=True)
        (folder / f"{name}.json").write_text(json.dumps(records))
        for record in records:
            picture = folder / name / record["image"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            if not picture.exists():
                Image.new("1", (1, 1)).save(picture)
    return tmp_path


def state(dataset: Dataset, root: Path) -> dict[str, tuple[str, str]]:
    seen = list(check.findings(dataset, root))
    return {Path(one.place).name: (one.state, one.detail) for one in seen}


def test_files_as_published_are_right_by_their_counts(root):
    seen = state(catalogue.VLGUARD, root)
    assert seen["train.json"][0] == "right"
    assert re.search(
        r"2000 records; 1023 unsafes; 977 safe_safes; 977 safe_unsafes; \d+ pictures", seen["train.json"][1]
    )
    assert seen["gpt4_safe_safes.json"][0] == "optional"
    assert check.whole(list(check.findings(catalogue.VLGUARD, root)))


def test_what_differs_is_said_in_words(root):
    file = root / "vlguard/test.json"
    records = json.loads(file.read_text())
    (root / "vlguard/test" / records[3]["image"]).unlink()
    file.write_text(json.dumps(records[:-1]))
    assert state(catalogue.VLGUARD, root)["test.json"] == (
        "differs",
        "999 records, published 1000; 557 safe_safes, published 558; 557 safe_unsafes, published 558; "
        "1 of 998 pictures are not there, such as "  # without that of the question that is N/A
        f"{root}/vlguard/test/{records[3]['image']}",
    )
    file.write_text(json.dumps(records)[:-100])
    kind, detail = state(catalogue.VLGUARD, root)["test.json"]
    assert kind == "differs"
    assert "record 999: not JSON" in detail
    file.unlink()
    assert state(catalogue.VLGUARD, root)["test.json"] == ("missing", "data/test.json of the repository")


def test_a_digest_counts_where_it_is_known(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    digest = hashlib.sha256(b"[1, 2]").hexdigest()
    dataset = dataclasses.replace(catalogue.ATTACKS, files=(File("a.json", "numbers", sha256=digest, records=2),))
    assert state(dataset, tmp_path)["a.json"] == ("right", f"SHA-256 {digest[:12]}; 2 records")
    other = dataclasses.replace(dataset, files=(File("a.json", "numbers", sha256="0" * 64),))
    assert state(other, tmp_path)["a.json"] == ("differs", f"SHA-256 {digest}, published {'0' * 64}")


def test_the_exit_status_is_zero_only_where_all_that_was_named_is_right(root, capsys):
    assert cli.main(["data", "check", "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "vlguard: right" in printed
    assert "textvqa: not here" in printed
    assert cli.main(["data", "check", "vlguard", "--root", str(root)]) == 0
    assert cli.main(["data", "check", "vlguard", "textvqa", "--root", str(root)]) == 1
    assert "not as published: textvqa" in capsys.readouterr().err
    (root / "vlguard/train.json").unlink()
    assert cli.main(["data", "check", "--root", str(root)]) == 1
    for wrong in ("vlgard", "hf://a/b"):
        assert cli.main(["data", "check", wrong]) == 2
    assert "did you mean 'vlguard'?" in capsys.readouterr().err
    assert cli.main(["data", "list"]) == 0
    assert set(DATASETS) <= set(re.findall(r"^(\w+):", capsys.readouterr().out, re.MULTILINE))


# ------------------------------------------------------------------------------------------------------- get


class Server(ThreadingHTTPServer):
    """Serves one file, whole or from a byte on. cut: transfers that break off after half of what they were to send."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.sent = content, 0, True, []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        served, start = self.server, 0
        if not self.path.endswith("there.json"):
            self.send_error(404)
            return
        if served.ranges and (asks := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(asks[1])
        if start >= len(served.content):
            self.send_error(416)
            return
        content = served.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if served.cut:
            served.cut -= 1
            content = content[: len(content) // 2]
        served.sent.append(len(content))
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


CONTENT = json.dumps(list(range(100_000))).encode()


@pytest.fixture
def server(monkeypatch):
    with Server(CONTENT) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        file = File(
            "own/there.json",
            "numbers",
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            url=f"http://127.0.0.1:{server.server_address[1]}/there.json",
        )
        monkeypatch.setitem(DATASETS, "own", dataclasses.replace(catalogue.ATTACKS, name="own", files=(file,)))
        yield server
        server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(server, tmp_path, cut, ranges):
    """A server that knows no ranges begins anew."""
    server.cut, server.ranges = cut, ranges
    assert download.get("own", tmp_path) == ["own/there.json: downloaded"]
    assert (tmp_path / "own/there.json").read_bytes() == CONTENT
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["there.json"]
    if ranges:
        assert sum(server.sent) == len(CONTENT)
    assert download.get("own", tmp_path) == ["own/there.json: is here already"]


def test_after_several_breaks_the_next_call_goes_on(server, tmp_path):
    server.cut = 3
    with pytest.raises(RunError, match=r"what has arrived is in .*there\.json\.part, and the next call goes on"):
        download.get("own", tmp_path)
    assert not (tmp_path / "own/there.json").exists()
    assert download.get("own", tmp_path) == ["own/there.json: downloaded"]
    assert sum(server.sent) == len(CONTENT)


def test_other_bytes_than_published_are_not_kept(server, tmp_path):
    server.content = b"[]"
    with pytest.raises(
        RunError, match=r"there\.json: what was downloaded has SHA-256 \w+, expected \w+; it is removed"
    ):
        download.get("own", tmp_path)
    assert list((tmp_path / "own").iterdir()) == []


def test_what_cannot_be_downloaded_says_where_it_is_and_what_goes_where(server, tmp_path, capsys):
    with pytest.raises(
        ConfigError, match=r"textvqa: no command can download it; from https://textvqa\.org.* put under"
    ):
        download.get("textvqa", tmp_path)
    gone = dataclasses.replace(DATASETS["own"].files[0], url=DATASETS["own"].files[0].url.replace("there", "away"))
    DATASETS["own"] = dataclasses.replace(DATASETS["own"], files=(gone,))
    with pytest.raises(RunError, match=r"away\.json: 404 Not Found"):
        download.get("own", tmp_path)
    assert cli.main(["data", "get"]) == 2
    assert "name what to download" in capsys.readouterr().err
