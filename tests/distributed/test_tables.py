"""Training and evaluation on pictures inside tables: the same run as on files, on ranks whose workers are forked."""

import json

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import launch, metrics

from mirage_dist import cli
from mirage_dist.data import formats, sources

SHORT = ["train.max_steps=3", "train.global_batch=8", "train.micro_batch=2", "data.workers=2"]


@pytest.fixture(scope="module")
def stored(toy):
    """The toy's base data in the forms in which the hub and `datasets` keep them, pictures inside."""
    folder = toy.root / "stored"
    folder.mkdir()
    rows = []
    for record in json.loads((toy.root / "world/base.json").read_text())[:40]:
        content = (toy.root / "world" / record["image"]).read_bytes()
        rows.append({**record, "image": {"bytes": content, "path": record["image"]}})
    (folder / "files.json").write_text(json.dumps([{**row, "image": row["image"]["path"]} for row in rows]))
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "conversations": datasets.List(turn)}
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(folder / "saved", num_shards=2)
    pq.write_table(dataset.data.table, folder / "table.parquet", row_group_size=4)
    return folder


def train(toy, stored, name, check=True):
    source = f"{{format: llava, path: {stored}/{name}, images: {toy.root}/world}}"
    overrides = [*toy.overrides("sft", stored / f"run-{name}"), f"data.streams.train=[{source}]"]
    return launch(2, "train", "configs/train/demo_sft.yaml", *overrides, *SHORT, check=check)


@pytest.fixture(scope="module")
def runs(toy, stored):
    """Name of the data -> the run on them."""
    for name in ("files.json", "table.parquet", "saved"):
        train(toy, stored, name)
    return {name: stored / f"run-{name}" for name in ("files.json", "table.parquet", "saved")}


def test_a_run_on_a_table_is_the_run_on_files(runs):
    """Losses to the last bit."""
    losses = {name: [line["loss"] for line in metrics(run)] for name, run in runs.items()}
    assert len(losses["files.json"]) == 3
    assert losses["table.parquet"] == losses["saved"] == losses["files.json"]
    samples = {name: json.loads((run / "manifest.json").read_text())["data"] for name, run in runs.items()}
    assert len({one["train"]["samples"] for one in samples.values()}) == 1


def test_a_table_that_was_replaced_under_a_run_is_refused_at_its_restart(toy, stored, runs):
    """As a requeue would meet it: the same rows in another order."""
    table = pq.read_table(stored / "table.parquet")
    pq.write_table(table.take(list(reversed(range(len(table))))), stored / "table.parquet")
    done = train(toy, stored, "table.parquet", check=False)
    assert done.returncode == 2
    assert "40 samples, but their content or order differs" in done.stdout + done.stderr


def test_an_evaluation_asks_about_pictures_inside_a_table(toy, stored, capsys):
    recipe = stored / "suite.yaml"
    recipe.write_text(
        f"""
run: {{dir: {stored}/evaluated}}
suite: tables
model: {{path: {toy.root}/model, dtype: fp32}}
judges: [keyword]
generation: {{max_new_tokens: 2, batch_size: 8}}
sets:
  safe: {{kind: safe, sources: [{{format: llava, path: {stored}/saved, limit: 6}}]}}
"""
    )
    assert cli.main(["eval", str(recipe)]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for file in stored.glob("evaluated/evals/tables/rows/*.jsonl") for line in file.open()]
    images = {sample.image for sample in sources.read(formats.source("llava", f"{stored}/saved", limit=6)).samples}
    assert {row["image"] for row in rows} == images
