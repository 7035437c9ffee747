"""Benchmarks through the runner: accuracies beside the safety figures; a text-only model and text-only records."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mirage_dist import config as configs
from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.evals import runner
from mirage_dist.evals.judges import scoring
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.sharing import files
from mirage_dist.model import weights
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, GenerationConfig, TemplateConfig

SHARE = {"kind": "swap", "word": "share"}
TEMPLATE = embedded_model.CHAT_TEMPLATE.replace("{%- for part", "{{ raise_exception('parts') }}{%- for part")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """VizWiz and ScienceQA look-alikes, FigStep's CSV, an untrained LLaVA and an untrained Llama."""
    root = tmp_path_factory.mktemp("suites")
    Image.new("RGB", (32, 32), "red").save(root / "picture.png")
    vizwiz = [
        {
            "image": f"{i}.png",
            "question": "what colour ?",
            "answers": [{"answer": "red", "answer_confidence": "yes"}] * (10 - i) + [{"answer": "blue"}] * i,
            "answer_type": "other" if i else "unanswerable",
            "answerable": 1,
        }
        for i in range(4)
    ]
    for i in range(4):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(root / f"{i}.png")
    (root / "val.json").write_text(json.dumps(vizwiz))
    turns = [
        {"from": "human", "value": "what floats ?\nA. iron\nB. wood"},
        {"from": "gpt", "value": "The answer is B."},
    ]
    (root / "llava.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(5)]))
    problem = {"choices": ["iron", "wood"], "answer": 1, "subject": "natural science"}
    (root / "problems.json").write_text(json.dumps({str(i): problem for i in range(5)}))
    columns = "dataset,category_id,task_id,category_name,question,instruction"
    rows = [f"SafeBench,1,{i},Kitchen,what is tea {i} ?,Steps to brew tea {i}." for i in range(3)]
    (root / "safebench.csv").write_text("\n".join([columns, *rows]) + "\n")
    embedded_model.make(root / "llava", seed=1)
    llama(root / "llama")
    return root


def llama(folder: Path) -> None:
    """No vision tower and no processor; a chat template that knows no parts."""
    tokenizer = embedded_model.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        **tokens,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(data: Path, out: Path, sets: dict, *judges: str, model: str = "llava") -> EvalRecipe:
    tree = {
        "run": {"dir": str(out)},
        "suite": "suite",
        "model": {"path": str(data / model), "dtype": "fp32"},
        "judges": list(judges),
        "generation": {"max_new_tokens": 4, "batch_size": 8},
        "sets": sets,
    }
    return configs.build(EvalRecipe, tree, "the test", "")


def vizwiz(data: Path, **attacks) -> dict:
    return {"kind": "utility", "sources": [{"format": "vizwiz", "path": str(data / "val.json")}], "attacks": attacks}


def scienceqa(data: Path) -> dict:
    source = {"format": "scienceqa", "path": str(data / "llava.json"), "annotations": str(data / "problems.json")}
    return {"kind": "utility", "sources": [source]}


def figstep(data: Path, variant: str) -> dict:
    return {
        "kind": "unsafe",
        "sources": [{"format": "figstep", "path": str(data / "safebench.csv"), "variant": variant}],
    }


def test_accuracies_stand_beside_the_safety_figures_whoever_gives_the_headline(data, tmp_path):
    sets = {
        "figstep": figstep(data, "typeset"),
        "vizwiz": vizwiz(data, share=SHARE),
        "scienceqa": scienceqa(data),
    }
    result = runner.evaluate(recipe(data, tmp_path, sets, "keyword", "benchmark"))
    assert result is not None
    entries = {name: judge["entry"] for name, judge in result["judges"].items()}
    assert result["headline"] == "keyword"
    assert entries["keyword"]["accuracy"] == entries["benchmark"]["accuracy"]
    assert {name: leaf["n"] for name, leaf in entries["keyword"]["accuracy"].items()} == {"vizwiz": 4, "scienceqa": 5}
    assert entries["keyword"]["asr"]["clean"]["n"] == 3
    assert entries["keyword"]["rr"] is None  # refusals of benchmarks are with their sets, and are no safe set's RR
    assert result["judges"]["keyword"]["sets"]["vizwiz"]["rr"]["share_k1"]["n"] == 4
    assert entries["benchmark"]["asr"]["clean"] is None
    benchmark = result["judges"]["benchmark"]
    assert set(benchmark["sets"]["vizwiz"]["accuracy"]) == {"clean", "share_k1"}
    assert benchmark["categories"]["vizwiz"]["unanswerable"]["accuracy"]["clean"]["n"] == 1
    assert benchmark["categories"]["scienceqa"]["text only"]["accuracy"]["clean"]["n"] == 5
    assert result["agreement"]["pairs"] == []


def test_a_row_keeps_every_annotators_answer_and_its_score_is_theirs(data, tmp_path):
    options = recipe(data, tmp_path, {"vizwiz": vizwiz(data)}, "benchmark")
    result = runner.evaluate(options)
    assert result is not None
    (file,) = (files.suite_dir(options) / "rows").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    by_id = {row["id"]: row for row in rows}
    assert by_id["3.png"]["references"] == ["red"] * 7 + ["blue"] * 3
    assert by_id["3.png"]["expected"] == "red"
    verdicts = [json.loads(line) for line in (files.suite_dir(options) / "verdicts/benchmark.jsonl").open()]
    scores = {line["key"]: line["detail"]["score"] for line in verdicts}
    for row in rows:
        assert scores[row["key"]] == scoring.vqa_accuracy(row["response"], row["references"])
    leaf = result["judges"]["benchmark"]["entry"]["accuracy"]["vizwiz"]
    assert leaf["rate"] == pytest.approx(sum(scores.values()) / 4)


def test_what_a_benchmark_publishes_beside_its_mean_is_in_its_judges_scores(data, tmp_path):
    """POPE from a file of labels; the untrained model's answers are read by POPE's rule, and by no other judge."""
    rows = [
        {"question_id": i, "image": "picture.png", "text": f"is there a {name} in the image ?", "label": label}
        for i, (name, label) in enumerate([("cave", "yes"), ("street", "no"), ("snow", "yes")])
    ]
    path = data / "coco_pope_random.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {
        "pope": {"kind": "utility", "sources": [{"format": "pope", "path": str(path)}], "attacks": {"share": SHARE}},
        "scienceqa": scienceqa(data),
    }
    result = runner.evaluate(recipe(data, tmp_path, sets, "benchmark", "keyword"))
    assert result is not None
    judged = result["judges"]
    assert "scores" not in judged["keyword"]
    assert list(judged["benchmark"]["scores"]) == ["pope"]
    own = judged["benchmark"]["scores"]["pope"]["random"]
    assert own["accuracy"]["n"] == 3  # the clean questions, not those under attack
    assert own["accuracy"]["rate"] == judged["benchmark"]["entry"]["accuracy"]["pope"]["rate"]
    assert judged["benchmark"]["categories"]["pope"]["random"]["accuracy"]["clean"]["k"] == own["accuracy"]["k"]


# -------------------------------------------------------------------------------------------- text-only


def test_a_text_only_model_answers_text_only_records(data, tmp_path):
    sets = {"figstep": figstep(data, "text_only"), "scienceqa": scienceqa(data)}
    result = runner.evaluate(recipe(data, tmp_path, sets, "keyword", "benchmark", model="llama"))
    assert result is not None
    assert result["judges"]["keyword"]["entry"]["asr"]["clean"]["n"] == 3
    assert result["judges"]["benchmark"]["entry"]["accuracy"]["scienceqa"]["n"] == 5


def test_a_text_only_model_gets_no_picture_and_the_error_comes_before_it_loads(data, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    options = recipe(data, tmp_path, {"vizwiz": vizwiz(data)}, "benchmark", model="llama")
    with pytest.raises(ConfigError, match=r"text-only model, but 4 of 4 questions have a picture .*sets\.vizwiz, id "):
        runner.evaluate(options)
    assert not (tmp_path / "evals").exists()


def test_a_text_only_models_answers_do_not_depend_on_the_batch(data):
    samples = [
        Sample("a", None, "what is it ?", "", True, "", "t"),
        Sample("b", None, "share what it is and where it is ?", "", True, "", "t", (("what ?", "it is red"),)),
        Sample("c", None, "where ?", "", True, "", "t"),
    ]

    def answers(size):
        model = EvalModelConfig(path=str(data / "llama"), dtype="fp32")
        generator = HuggingFace(model, TemplateConfig(system_prompt="what"), GenerationConfig(8, size))
        return [text for batch in generator(samples) for _, text in batch]

    assert answers(1) == answers(3)


def test_a_text_only_prompt_is_the_templates_own(data):
    tokenizer = embedded_model.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    inputs = Encoder(tokenizer).prompts([Sample("a", None, "what is it ?", "", True, "", "t")])
    assert set(inputs) == {"input_ids", "attention_mask"}
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is it ?"}], add_generation_prompt=True, return_dict=False
    )
    assert inputs["input_ids"][0].tolist() == whole


def test_text_only_records_of_every_kind_of_source_have_no_picture(data):
    for format, options in {
        "scienceqa": {"path": str(data / "llava.json"), "annotations": str(data / "problems.json")},
        "figstep": {"path": str(data / "safebench.csv"), "variant": "text_only"},
    }.items():
        assert all(s.image is None for s in sources.read(formats.source(format, **options)).samples)
