"""`mirage export --push` against a local server that answers as the hub does: what is there afterwards is the export,
byte for byte, or nothing is, and the command says which.

Paths, fields and status codes of the server are those that huggingface_hub 2.4 sends and reads (hf_api.py,
_commit_api.py, lfs.py of its source, read 2026-11-27).
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from made_runs import write_run
from trained_runs import made_run

from mirage_dist import disk, runs, state
from mirage_dist.cli import main
from mirage_dist.evals import results
from mirage_dist.hub import measured
from mirage_dist.model import directory
from mirage_dist.model.exports import card

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8rS1tU4vW7xY0zA3b"
LORA = "model.lora={rank: 2, alpha: 4, dropout: 0.0, targets: [decoder]}"


class Hub(ThreadingHTTPServer):
    """The hub's model repositories: name -> its files, visibility and commits.

    refuse: status of a path's part, for requests that shall fail. large: files from so many bytes are stored apart.
    lost: the answer to the next commit does not arrive, although the commit does. spoil: a file that is stored wrong.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}
        self.requests: list[str] = []
        self.role, self.large, self.lost, self.spoil = "write", 4096, False, ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, private: bool = True, files: dict[str, bytes] | None = None) -> None:
        own = {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}
        self.repositories[name] = {"private": private, "files": own, "stored": set(), "commits": ["0" * 40]}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if status := next((s for part, s in hub.refuse.items() if part in path), None):
            return self.give({"error": "not today"}, status)
        if path.startswith("/objects/"):
            assert hashlib.sha256(body).hexdigest() == path.rsplit("/", 1)[1]
            hub.objects[path.rsplit("/", 1)[1]] = body
            return self.give({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.give({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.give({"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": hub.role}}})
        if path == "/api/validate-yaml":
            return self.give({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        match = re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/(tree|preupload|commit)/\w+)?", path)
        lfs = re.fullmatch(r"/(\w+/[\w.-]+).git/info/lfs/objects/batch", path)
        name = (match or lfs)[1] if match or lfs else ""
        if name not in hub.repositories:
            return self.give({"error": "Repository not found"}, 404, "RepoNotFound")
        if lfs:
            return self.batch(json.loads(body))
        return getattr(self, match[2] or "info")(name, hub.repositories[name], body)

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repositories:
            return self.give({"error": "You already created this model repo"}, 409)
        private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
        self.server.add(name, private)
        return self.give({"url": f"{self.server.address}/{name}"})

    def info(self, name: str, own: dict, body: bytes) -> None:
        self.give({"id": name, "sha": own["commits"][-1], "private": own["private"], "siblings": []})

    def tree(self, name: str, own: dict, body: bytes) -> None:
        listed = []
        for path, content in own["files"].items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": path, "size": len(content), "oid": git}
            if path in own["stored"]:
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {"oid": "1" * 40, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
            listed.append(entry)
        self.give(listed)

    def preupload(self, name: str, own: dict, body: bytes) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= self.server.large else "regular",
             "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]  # fmt: skip
        self.give({"files": modes})

    def batch(self, wanted: dict) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"],
             "actions": {"upload": {"href": f"{self.server.address}/objects/{o['oid']}"}}}
            for o in wanted["objects"]
        ]  # fmt: skip
        self.give({"transfer": "basic", "objects": objects})

    def commit(self, name: str, own: dict, body: bytes) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"]["parentCommit"] != own["commits"][-1]:
            return self.give({"error": "A commit has happened since."}, 412)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                own["stored"].add(value["path"])
            else:
                content = base64.b64decode(value["content"])
            own["files"][value["path"]] = content[:-1] if value["path"] == self.server.spoil else content
        own["commits"].append(hashlib.sha1(body).hexdigest())
        if self.server.lost:
            self.server.lost = False
            self.close_connection = True
            return None
        return self.give({"commitUrl": f"{self.server.address}/{name}/commit/x", "commitOid": own["commits"][-1]})

    def give(self, content: object, status: int = 200, code: str = "") -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(raw)), "Content-Type": "application/json", "X-Error-Code": code}
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet's own storage is not what is tested
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
        yield server
        server.shutdown()


def evaluated(run: Path, suite: str, model_hash: str, judge: str = "world") -> None:
    """A finished evaluation in the run's directory."""
    pattern = {"unsafe": ["harmful", "refused", "irrelevant"], "safe": ["correct", "refused"]}
    write_run(run, pattern, suite=suite, judge=judge)
    file = run / "evals" / suite / "metrics.json"
    result = {**results.read(file.parent), "model_hash": model_hash}
    result.pop("seal", None)
    file.write_text(results.text(result))


def checkpoint_hash(run: Path) -> str:
    return disk.sha256(run / "checkpoints/step-000003/manifest.json")


@pytest.fixture(scope="module")
def merged(toy, tmp_path_factory) -> Path:
    run = made_run(toy, tmp_path_factory.mktemp("runs") / "npo", "run.name=gadget-npo")
    evaluated(run, "demo", checkpoint_hash(run))
    evaluated(run, "other", "7" * 64)  # of another model
    return run


@pytest.fixture(scope="module")
def adapted(toy, tmp_path_factory) -> Path:
    return made_run(toy, tmp_path_factory.mktemp("runs") / "lora", LORA)


@pytest.fixture(scope="module")
def written(merged, tmp_path_factory) -> Path:
    """An export by `--dry-run`, to copy."""
    out = tmp_path_factory.mktemp("exports") / "out"
    assert main(["export", str(merged), str(out), "--push", "lab/gadget", "--dry-run"]) == 0
    return out


@pytest.fixture
def out(written, tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    for file in written.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def uploaded(hub: Hub, name: str) -> dict[str, bytes]:
    return {path: held for path, held in hub.repositories[name]["files"].items() if path != ".gitattributes"}


def push(run: Path, out: Path, name: str = "lab/gadget", *more: str) -> int:
    return main(["export", str(run), str(out), "--push", name, *more])


# ------------------------------------------------------------------------------------------------------------- card


def test_the_head_is_what_the_hubs_library_reads_back_and_every_rate_is_in_it(written, merged):
    content = (written / "README.md").read_text()
    head = ModelCard(content).data
    assert str(ModelCard(content)) == content  # its own writer makes the same of it
    own = head.to_dict()
    assert own["library_name"] == "transformers"
    assert own["pipeline_tag"] == "image-text-to-text"
    assert "base_model" not in own  # a directory of this machine is no model of the hub
    assert own["base_model_hash"] == runs.manifest(merged)["base_hash"]
    assert own["checkpoint_hash"] == checkpoint_hash(merged)
    entry = results.read(merged / "evals/demo")["judges"]["world"]["sets"]
    wanted = {
        (kind, measure, condition): entry[kind][measure][key]
        for kind, measure, condition, key in (
            ("unsafe", "asr", "clean", "clean"),
            ("unsafe", "asr", "what, K = 3", "what_k3"),
            ("unsafe", "asr", "neutral, K = 1", "neutral_k1"),
            ("unsafe", "ir", "clean", "clean"),
            ("unsafe", "ir", "what, K = 3", "what_k3"),
            ("safe", "rr", "clean", "clean"),
            ("safe", "rr", "share, K = 1", "share_k1"),
            ("safe", "utility", "clean", "clean"),
            ("safe", "utility", "share, K = 1", "share_k1"),
        )
    }
    seen = {(r.dataset_config, r.metric_type, r.dataset_split): r for r in head.eval_results}
    assert seen.keys() == wanted.keys()
    for key, leaf in wanted.items():
        assert seen[key].metric_value == leaf["rate"]
        assert seen[key].metric_args["ci95"] == leaf["ci95"]
        assert (seen[key].metric_args["k"], seen[key].metric_args["n"]) == (leaf["k"], leaf["n"])
        low, high = (100 * bound for bound in leaf["ci95"])
        assert f"{100 * leaf['rate']:.1f} ({low:.1f}–{high:.1f})" in content
    assert {r.dataset_type for r in head.eval_results} == {"demo"}  # nothing of the other model's evaluation


def test_the_card_names_data_objective_and_settings_and_no_directory_of_this_machine(written, merged, toy):
    content = (written / "README.md").read_text()
    recipe = runs.recipe(merged)
    for words in (
        "# gadget-npo",
        f"| forget | 20 | `{'f' * 64}` | forget.jsonl |",
        "| objective.name | npo |",
        f"| objective.beta | {recipe.objective['beta']} |",
        f"| train.lr | {recipe.train.lr} |",
        "## Intended use",
        "## Limits",
        "proves neither that knowledge was erased",
    ):
        assert words in content
    for place in (toy.root, merged, Path.cwd()):
        assert str(place) not in content


def test_cells_hold_no_markup_and_long_options_lose_their_folders(merged):
    rate = card.Rate("x|y", "asr", "Attack success rate", "clean", 0.5, 1, 2, (0.1, 0.9), "j", 3)
    subject = card.Subject(
        merged, runs.recipe(merged), 3, "c" * 64, "b" * 64, "merged", "text-generation", None,
        [card.Evaluation("s", "a judge | with <b>marks</b>", 0, "r", (rate,), ("a *caution*",))],
    )  # fmt: skip
    recipe = replace(subject.recipe, objective={"name": "my:Own", "file": "/a/b.txt"})
    text = card.text(replace(subject, recipe=recipe))
    assert "judged by a judge \\| with \\<b\\>marks\\</b\\>" in text
    assert "| x\\|y | Attack success rate | clean | 50.0 (10.0–90.0) | 1/2, 3 without verdict |" in text
    assert "**a \\*caution\\***" in text
    assert "| objective.file | b.txt |" in text
    assert ModelCard(text).data.eval_results[0].dataset_config == "x|y"


def test_rates_of_an_export_that_was_evaluated_belong_to_its_checkpoint(toy, tmp_path, capsys):
    """By the hash of the very files, by the card of an earlier export; not once that one has changed."""
    run = made_run(toy, tmp_path / "run")
    first = tmp_path / "first"
    assert main(["export", str(run), str(first)]) == 0
    assert "so nothing is known here" in (first / "README.md").read_text()
    evaluated(run, "same", directory.model_hash(first))
    assert main(["export", str(run), str(tmp_path / "second")]) == 0
    assert {r.dataset_type for r in ModelCard.load(tmp_path / "second/README.md").data.eval_results} == {"same"}
    # Saved in other files, as by another number of ranks: the card alone shows what it is.
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**config, "note": "other bytes"}))
    file = run / "evals/same/metrics.json"
    result = {**results.read(file.parent), "model_hash": directory.model_hash(first)}
    result.pop("seal", None)
    file.write_text(results.text(result))
    settings = {"settings": {}, "model": {"path": str(first)}}
    (run / "evals/same/manifest.json").write_text(state.sealed("suite", settings))
    assert main(["export", str(run), str(tmp_path / "third")]) == 0
    assert {r.dataset_type for r in ModelCard.load(tmp_path / "third/README.md").data.eval_results} == {"same"}
    (first / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "fourth")]) == 0
    assert "same: measured another model than step-000003" in capsys.readouterr().err
    assert ModelCard.load(tmp_path / "fourth/README.md").data.eval_results is None
    file.write_bytes(file.read_bytes().replace(b"demo", b"dema").replace(b"same", b"sane"))
    assert measured.evaluations(run, tmp_path / "fourth", run / "checkpoints/step-000003") == []
    assert "Its rates are not in the card" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ upload


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--lab--model", "lab/model"),
        ("models--lab--my--model", "lab/my--model"),
        ("models--gpt2", "gpt2"),
        ("datasets--lab--model", None),
    ],
)
def test_the_hubs_name_of_a_snapshot_is_that_of_its_cache(tmp_path, folder, name):
    """Folders of the cache: huggingface_hub's guide "Understand caching". Only the first -- ends the owner's name."""
    snapshot = tmp_path / folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    assert card.hub_name(str(snapshot)) == name


def test_a_dry_run_writes_the_export_and_asks_nobody(merged, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    out = tmp_path / "out"
    assert push(merged, out, "lab/gadget", "--dry-run") == 0
    printed = capsys.readouterr().out
    for path, content in tree(out).items():
        assert re.search(rf"^ *{len(content):,}  {re.escape(path)}$", printed, re.MULTILINE)
    assert "nothing was uploaded. Without --dry-run" in printed
    assert "go to the private model repository lab/gadget" in printed
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)


@pytest.mark.parametrize("public", [False, True])
def test_what_is_uploaded_is_the_export_byte_for_byte_in_one_commit_and_private(hub, merged, out, capsys, public):
    edited = (out / "README.md").read_text() + "\nA word of ours.\n"
    (out / "README.md").write_text(edited)
    assert push(merged, out, "lab/gadget", *(["--public"] if public else [])) == 0
    assert uploaded(hub, "lab/gadget") == tree(out)
    own = hub.repositories["lab/gadget"]
    assert own["private"] is not public
    assert len(own["commits"]) == 2
    assert "model.safetensors" in own["stored"]
    assert "README.md" not in own["stored"] or len(edited) >= hub.large
    printed = capsys.readouterr()
    assert f"{hub.address}/lab/gadget: {len(tree(out))} files" in printed.out
    assert "9 rates in the card" in printed.out
    assert ("public, one commit" if public else "private, one commit") in printed.out
    assert TOKEN not in printed.out + printed.err
    assert not any(TOKEN.encode() in content for content in tree(out).values())
    assert push(merged, out, "lab/gadget", *(["--public"] if public else [])) == 0
    assert "already, whole" in capsys.readouterr().out
    assert len(own["commits"]) == 2


def test_the_command_of_a_user_uploads_an_adapter(hub, adapted, tmp_path):
    """In a process of its own, with the endpoint from the environment, as users start it."""
    out = tmp_path / "out"
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    words = ["export", str(adapted), str(out), "--as", "adapter", "--push", "ada/gadget-lora", "--base", "lab/gadget"]
    done = subprocess.run(
        [sys.executable, "-m", "mirage_dist.cli", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert uploaded(hub, "ada/gadget-lora") == tree(out)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "lab/gadget"
    head = ModelCard.load(out / "README.md").data
    assert (head.library_name, head.base_model) == ("peft", "lab/gadget")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_an_answer_that_is_lost_after_the_commit_is_no_failure(hub, merged, out, capsys):
    hub.lost = True
    assert push(merged, out) == 0
    assert uploaded(hub, "lab/gadget") == tree(out)
    assert "one commit" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["/preupload/", "/objects/batch", "/objects/", "/commit/"])
def test_an_upload_that_breaks_off_leaves_nothing_and_the_same_command_goes_on(hub, merged, out, capsys, part):
    hub.refuse = {part: 500}
    assert push(merged, out) == 1
    printed = capsys.readouterr()
    assert "nothing was uploaded" in printed.err
    assert "Give the same command again" in printed.err
    assert not printed.out
    assert uploaded(hub, "lab/gadget") == {}
    hub.refuse = {}
    assert push(merged, out) == 0
    assert uploaded(hub, "lab/gadget") == tree(out)


def test_a_hub_that_stores_something_else_is_noticed(hub, merged, out, capsys):
    hub.spoil = "config.json"
    assert push(merged, out) == 1
    assert "does not hold what" in (error := capsys.readouterr().err)
    assert "config.json differs" in error
    assert push(merged, out) == 2
    assert "exists and holds" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gadget", "expected OWNER/NAME"),
        ("lab/a/b", "no name of a repository"),
        ("lab/-x", "no name of a repository"),
        ("lab/a--b", "Cannot have -- or .."),
        ("läb/x", "no name of a repository"),
        ("", "no name of a repository"),
    ],
)
def test_a_malformed_name_is_refused_before_anything_is_written(hub, merged, tmp_path, capsys, name, words):
    for more in ((), ("--dry-run",)):
        assert push(merged, tmp_path / "out", name, *more) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not hub.requests


def test_what_the_hub_would_refuse_is_said_before_anything_is_written(hub, merged, tmp_path, monkeypatch, capsys):
    def refused(words: str, status: int = 2, name: str = "lab/gadget", *more: str) -> None:
        assert push(merged, tmp_path / "out", name, *more) == status
        printed = capsys.readouterr()
        assert words in printed.err, printed.err
        assert TOKEN not in printed.err
        assert not (tmp_path / "out").exists()
        assert not printed.out

    refused("the token belongs to ada, who may not write as other", 2, "other/gadget")
    hub.role = "read"
    refused("the token may only read; set HF_TOKEN")
    hub.role = "write"
    hub.add("lab/gadget", files={"config.json": b"{}"})
    refused("exists and holds 2 files; choose another name")
    refused("exists and is private; give the command without --public", 2, "lab/gadget", "--public")
    hub.add("lab/empty", private=False)
    refused("exists and is public; give the command with --public", 2, "lab/empty")
    assert hub.repositories["lab/gadget"]["commits"] == ["0" * 40]
    hub.refuse = {"whoami": 503}
    refused("the hub answers 503", 1)
    hub.refuse = {}
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "x")
    refused("the hub refuses the token; set HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("there is no token of the hub; set HF_TOKEN to a token that may write, or log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as closed:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.server_address[1]}")
    refused("cannot be reached, or is no hub", 1)


def test_a_name_that_somebody_takes_meanwhile_and_a_right_that_is_missing_are_named(hub, merged, out, capsys):
    hub.refuse = {"/repos/create": 409}
    assert push(merged, out) == 2
    assert "lab/gadget: exists already; choose another name" in capsys.readouterr().err
    hub.refuse = {"/repos/create": 403}
    assert push(merged, out) == 2
    assert "the token may not do this" in capsys.readouterr().err
    assert hub.repositories == {}


def test_only_an_unchanged_export_of_the_checkpoint_is_uploaded(hub, merged, adapted, out, capsys):
    def refused(words: str, run: Path = merged, *more: str) -> None:
        assert push(run, out, "lab/gadget", *more) == 2
        assert words in (error := capsys.readouterr().err), error

    refused("is no merged export of this checkpoint", adapted)
    refused("is no adapter export of this checkpoint", adapted, "--as", "adapter", "--base", "lab/x")
    (out / ".gitignore").write_text("*.json")
    refused(".gitignore: is no file of an export")
    (out / ".gitignore").unlink()
    kept = (out / "README.md").read_text()
    (out / "README.md").write_text(kept.replace("# gadget-npo", f"# of {merged}"))
    refused(f"README.md: names {os.path.realpath(merged)}, a path of this machine")
    (out / "README.md").write_text(kept)
    tokenizer = (out / "tokenizer_config.json").read_text()
    (out / "tokenizer_config.json").write_text(json.dumps({**json.loads(tokenizer), "name_or_path": str(Path.cwd())}))
    refused(f"tokenizer_config.json: names {Path.cwd()}, a path of this machine")
    (out / "tokenizer_config.json").write_text(tokenizer)
    (out / "README.md").write_text(kept.replace("model-index:", "model-index: 3\nother:"))
    refused("README.md: is no model card")
    (out / "README.md").write_text(kept)
    raw = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refused("model.safetensors: changed since it was exported")
    assert hub.repositories == {}


def test_an_adapter_of_a_base_without_a_name_and_options_without_an_upload_are_refused(hub, adapted, tmp_path, capsys):
    out = tmp_path / "out"
    assert push(adapted, out, "lab/gadget", "--as", "adapter") == 2
    assert "give its name on the hub with --base OWNER/NAME" in capsys.readouterr().err
    assert push(adapted, out, "lab/gadget", "--as", "adapter", "--base", "lab") == 2
    assert "--base 'lab': no name of a repository" in capsys.readouterr().err
    for flag in ("--public", "--dry-run"):
        assert main(["export", str(adapted), str(out), flag]) == 2
        assert f"{flag}: belongs to an upload" in capsys.readouterr().err
    assert not out.exists()
    assert hub.requests == [] or all(line.startswith("GET") for line in hub.requests)


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("a model (/scratch/lab/guard-v3) asked", "a model (guard-v3) asked"),
        (
            "the list /a/phrases.json, and/or https://hub.example/a/b/c",
            "the list phrases.json, and/or https://hub.example/a/b/c",
        ),
        ("Qwen/Qwen2.5-VL-7B and 3/4 of ../x/y", "Qwen/Qwen2.5-VL-7B and 3/4 of ../x/y"),
    ],
)
def test_a_sentence_for_a_card_names_no_place(sentence, shown):
    assert card.without_places(sentence) == shown
    assert card.PLACE.search(shown) is None
