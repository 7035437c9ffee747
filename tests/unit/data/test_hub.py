"""Datasets of the hub: what the cache holds is read as it lies there, what is missing is said before anything starts.

The cache's layout (refs/, snapshots/COMMIT/ with links into blobs/) is huggingface_hub's documented one. The card and
the files' names are those of SPA-VL on the hub (configurations `default` and `test`, splits `harm` and `help`; read
2026-11-26); the rows are ours.
"""

import contextlib
import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from mirage_dist import cli
from mirage_dist.data import formats, pictures, sources
from mirage_dist.data.published import hub
from mirage_dist.schema import ConfigError, RunError

COMMIT = "6abf7f4f1d0cd9bb8800754584b57a641517f0b9"
CARD = """---
license: cc-by-4.0
dataset_info:
- config_name: default
  features:
  - name: image
    dtype: image
  - name: question
    dtype: string
  - name: chosen
    dtype: string
  - name: rejected
    dtype: string
  splits:
  - name: train
    num_bytes: 100
    num_examples: {rows}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
- config_name: test
  data_files:
  - split: harm
    path: test/harm-*
  - split: help
    path: test/help-*
---
A card.
"""


def encoded(number: int) -> bytes:
    output = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), number, dtype=np.uint8)).save(output, format="PNG")
    return output.getvalue()


def table(numbers, test: bool = False) -> pa.Table:
    rows = []
    for number in numbers:
        row = {"image": {"bytes": encoded(number), "path": None}, "question": f"What is number {number}?"}
        row |= (
            {"class1": "a", "class2": "b", "class3": "c"}
            if test
            else {"chosen": f"A gadget {number}.", "rejected": "No idea.", "image_name": f"{number}.png"}
        )
        rows.append(row)
    return pa.Table.from_pylist(rows)


def parquet(content: pa.Table) -> bytes:
    output = io.BytesIO()
    pq.write_table(content, output, row_group_size=2)
    return output.getvalue()


def repository(rows: int = 7) -> dict[str, bytes]:
    """Path in the repository -> content."""
    return {
        "README.md": CARD.format(rows=rows).encode(),
        "data/train-00000-of-00002.parquet": parquet(table(range(4))),
        "data/train-00001-of-00002.parquet": parquet(table(range(4, 7))),
        "test/harm-00000-of-00001.parquet": parquet(table(range(10, 13), test=True)),
        "test/help-00000-of-00001.parquet": parquet(table(range(20, 22), test=True)),
    }


def store(cache: Path, files: dict[str, bytes], name: str = "lab/SPA-VL") -> Path:
    """Put a revision into a cache, as huggingface_hub does; returns its snapshot."""
    root = cache / f"datasets--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    for path, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(blob)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.split.cache_clear()
    yield tmp_path / "hub"
    hub.split.cache_clear()


def source(**options):
    return formats.source("spa_vl", "hf://lab/SPA-VL", **options)


def test_a_split_of_the_cache_is_read_in_order_across_its_files(cache):
    """Records are numbered through all files, so that ids made of numbers are unique."""
    store(cache, repository())
    samples = sources.read(source()).samples
    assert [s.question for s in samples] == [f"What is number {i}?" for i in range(7)]
    assert [s.id for s in samples] == [str(i) for i in range(7)]
    assert [pictures.sha256(s.image) for s in samples] == [hashlib.sha256(encoded(i)).hexdigest() for i in range(7)]
    assert all("/snapshots/" in s.image for s in samples)


@pytest.mark.parametrize("revision", ["@main", f"@{COMMIT}"])
def test_revision_configuration_and_split_are_chosen(cache, revision):
    store(cache, repository())
    config = formats.source("spa_vl", f"hf://lab/SPA-VL{revision}", config="test", split="harm", response="absent")
    assert [s.question for s in sources.read(config).samples] == [f"What is number {i}?" for i in range(10, 13)]
    assert sources.read(config).commits == {f"hf://lab/SPA-VL{revision}": COMMIT}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"config": "test", "response": "absent"}, "several splits in configuration 'test'; split: harm, help"),
        ({"split": "trian"}, "no split 'trian' in configuration 'default'; split: train"),
        ({"config": "tests"}, r"config=tests: .*Available: \['default', 'test'\]"),
    ],
)
def test_a_choice_that_is_missing_or_wrong_names_those_there_are(cache, options, why):
    store(cache, repository())
    with pytest.raises(ConfigError, match=why):
        sources.read(source(**options))


def test_what_is_not_in_the_cache_names_the_command_that_brings_it(cache):
    for path in ("hf://lab/SPA-VL", "hf://lab/SPA-VL@v9"):
        with pytest.raises(ConfigError, match=rf"{path}: not in the cache of the hub .*`mirage data get {path}`"):
            sources.read(formats.source("spa_vl", path))
        if not cache.exists():
            store(cache, repository())
    for path in ("hf://", "hf://a/b/c", "hf://a/b@", "hf:///b"):
        with pytest.raises(ConfigError, match=r"expected hf://OWNER/NAME, or hf://OWNER/NAME@REVISION"):
            sources.read(formats.source("spa_vl", path))


def test_a_part_of_a_split_is_never_taken_for_the_whole(cache):
    """A download that broke off leaves the other shards; a shard that was replaced may have other rows."""
    snapshot = store(cache, repository())
    lost = snapshot / "data/train-00001-of-00002.parquet"
    blob = lost.readlink()
    content = blob.read_bytes()
    lost.unlink()
    with pytest.raises(ConfigError, match=r"train-00001-of-00002\.parquet is not in the cache, and 0 others"):
        sources.read(source())
    lost.symlink_to(blob)
    blob.unlink()  # a link without its blob
    hub.split.cache_clear()
    with pytest.raises(ConfigError, match=r"train-00001-of-00002\.parquet is not in the cache, and 0 others"):
        sources.read(source())
    blob.write_bytes(content)
    assert len(sources.read(source()).samples) == 7
    lost.unlink()
    lost.write_bytes(parquet(table(range(4, 6))))
    with pytest.raises(ConfigError, match="6 records in the cache, 7 by the dataset's card"):
        sources.read(source())


def test_a_damaged_card_is_an_error_that_names_the_dataset(cache):
    files = repository()
    files["README.md"] = b"---\nconfigs: [{config_name: default, data_files: 3}]\n---\n"
    store(cache, files)
    with pytest.raises(ConfigError, match="hf://lab/SPA-VL: config=None: "):
        sources.read(source())


def test_configuration_and_split_belong_to_the_hub():
    with pytest.raises(ConfigError, match="split='train'; belongs to format=vlguard or to a dataset of the hub"):
        formats.source("llava", "data.json", split="train")
    with pytest.raises(ConfigError, match="table='train': belongs to a dataset of the hub"):
        formats.source("vlguard", "data.json", table="train")


def test_json_of_the_hub_finds_its_pictures_beside_it(cache):
    """VLGuard's records name pictures by path, and its option `split` means pairs; `table` is the hub's split."""
    record = {"id": "u", "image": "bad/1.png", "safe": False, "harmful_category": "a", "harmful_subcategory": "b"}
    rows = [{**record, "instr-resp": [{"instruction": "Share it.", "response": "No."}]}]
    store(cache, {"train.json": json.dumps(rows).encode(), "bad/1.png": encoded(3)}, "lab/VLGuard")
    config = formats.source("vlguard", "hf://lab/VLGuard", table="train", split="unsafes")
    (sample,) = sources.read(config).samples
    assert pictures.sha256(sample.image) == hashlib.sha256(encoded(3)).hexdigest()


def test_an_audit_reads_the_hub(cache, capsys):
    store(cache, repository())
    assert cli.main(["audit", "hf://lab/SPA-VL", "--split", "train", "--refusals", ""]) == 2
    capsys.readouterr()
    cli.main(["audit", "hf://lab/SPA-VL", "--split", "train"])
    assert "7" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- downloading


class Hub(ThreadingHTTPServer):
    """Answers as the hub does: a revision's files, and their bytes. cut: files whose transfer breaks off once."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.requests, self.cut, self.status, self.code = files, [], set(), 200, ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(path)
        if hub.status != 200:
            self.respond(b"", hub.status, {"X-Error-Code": hub.code})
        elif path.startswith("/api/datasets/lab/SPA-VL/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in hub.files.items()
            ]
            self.respond(json.dumps(listed).encode())
        elif path.startswith("/api/datasets/lab/SPA-VL"):
            self.respond(json.dumps({"id": "lab/SPA-VL", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/datasets/lab/SPA-VL/resolve/{COMMIT}/"):
            content = hub.files[path.split(f"{COMMIT}/")[1]]
            self.respond(content, headers={"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.respond(b"", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def respond(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        name = self.path.rsplit("/", 1)[1]
        broken = self.command == "GET" and name in self.server.cut
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.server.cut.discard(name)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(cache, monkeypatch):
    with Hub(repository()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
        yield server
        server.shutdown()


def test_what_is_downloaded_is_what_is_read(server):
    assert hub.download(hub.address("hf://lab/SPA-VL")) == COMMIT
    assert [s.question for s in sources.read(source()).samples] == [f"What is number {i}?" for i in range(7)]
    transfers = len([path for path in server.requests if "/resolve/" in path])
    hub.download(hub.address("hf://lab/SPA-VL"))
    assert len([path for path in server.requests if "/resolve/" in path]) == transfers


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (403, "GatedRepo", "its owners ask who downloads it. Accept their terms on .*/datasets/lab/SPA-VL"),
        (404, "RepoNotFound", "the hub has no such dataset, or it is private"),
        (404, "RevisionNotFound", "the hub has no such revision"),
    ],
)
def test_a_dataset_that_the_hub_does_not_give_is_named_with_what_to_do(server, status, code, why):
    server.status, server.code = status, code
    with pytest.raises(ConfigError, match=f"hf://lab/SPA-VL: {why}"):
        hub.download(hub.address("hf://lab/SPA-VL"))


def test_a_transfer_that_breaks_off_is_finished(server):
    server.cut = {"train-00001-of-00002.parquet", "README.md"}
    for _ in range(3):
        with contextlib.suppress(RunError):
            hub.download(hub.address("hf://lab/SPA-VL"))
            break
    assert not server.cut
    assert len(sources.read(source()).samples) == 7


def test_a_hub_that_fails_or_is_away_leaves_no_dataset_that_seems_whole(server, cache):
    """Also where an older revision is in the cache, which would do for a reader and not for a download."""
    store(cache, {"README.md": b"old"})
    server.status = 503
    with pytest.raises(RunError, match="`mirage data get hf://lab/SPA-VL` goes on where it stopped"):
        hub.download(hub.address("hf://lab/SPA-VL"))
    server.status = 200
    server.shutdown()
    server.server_close()
    with pytest.raises(RunError, match="goes on where it stopped"):
        hub.download(hub.address("hf://lab/SPA-VL"))
