"""The published data that our recipes use: what each is, where it is published, and which files go where.

docs/get_data.md is this table. Counts are those of the files themselves, where they could be read, and otherwise of the
papers; licences are stated where the publication states them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SEE = "see its page"
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class File:
    """A file under the folder of all data, by default `data/`.

    holds: what it is. records: how many it has; None where that is not known. counts: pairs of each split, those that
    are left out included, by the value of the option `split`. source: how a recipe reads it; without it records are
    counted only. sha256: of the file, where it is known. url: where it can be downloaded from. optional: no suite needs
    it.
    """

    path: str
    holds: str
    records: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    source: Mapping[str, Any] | None = None
    sha256: str | None = None
    url: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset of the hub, and the rows that it has."""

    config: str
    split: str
    rows: int


@dataclass(frozen=True)
class Dataset:
    """One publication. hub: its address on the hub. splits: those that are read there, in place of files.

    pictures: folder -> what goes into it.
    """

    name: str
    title: str
    use: Literal["training", "evaluation", "training, evaluation"]
    licence: str
    page: str
    size: str
    files: tuple[File, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    hub: str | None = None
    splits: tuple[HubSplit, ...] = ()
    gated: bool = False
    note: str = ""


VLGUARD = Dataset(
    name="vlguard",
    title="VLGuard (Zong et al., ICML 2024)",
    use="training, evaluation",
    licence=SEE,
    page="https://github.com/ys-zong/VLGuard",
    size="2000 pictures to train on, 1000 to test with",
    files=(
        File(
            "vlguard/train.json",
            "data/train.json of the repository",
            records=2000,
            counts={"unsafes": 1023, "safe_safes": 977, "safe_unsafes": 977},
            source={"format": "vlguard", "images": "vlguard/train"},
            url=f"{GITHUB}/ys-zong/VLGuard/main/data/train.json",
        ),
        File(
            "vlguard/test.json",
            "data/test.json of the repository",
            records=1000,
            counts={"unsafes": 442, "safe_safes": 558, "safe_unsafes": 558},
            source={"format": "vlguard", "images": "vlguard/test"},
            url=f"{GITHUB}/ys-zong/VLGuard/main/data/test.json",
        ),
        File(
            "vlguard/gpt4_safe_safes.json",
            "data/gpt4_safe_safes.json: answers to compare with",
            records=558,
            source={"format": "vlguard", "images": "vlguard/test"},
            url=f"{GITHUB}/ys-zong/VLGuard/main/data/gpt4_safe_safes.json",
            optional=True,
        ),
    ),
    pictures={"vlguard/train": "train.zip", "vlguard/test": "test.zip"},
    hub="hf://ys-zong/VLGuard",
    gated=True,
    note="The hub has the same JSON and zip files; unpack the zip files. Unsafe questions are N/A 14 times in "
    "train.json (1009 are asked) and once in test.json (441 are asked); 17 safe answers of test.json are empty.",
)
ATTACKS = Dataset(
    name="safety_mirage",
    title="Safety Mirage's rewrites of VLGuard's test questions (arXiv 2503.11832)",
    use="evaluation",
    licence=SEE,
    page="https://github.com/OPTML-Group/VLM-Safety-Unlearn",
    size="1882 rewrites",
    files=(
        File(
            "vlguard/test_what_3shot.json",
            "eval/safety_data/test_what_3shot.json: three rewrites of each unsafe question",
            records=1326,
        ),
        File(
            "vlguard/test_share_1shot.json",
            "eval/safety_data/test_share_1shot.json: one rewrite of 556 of the 558 safe questions",
            records=556,
        ),
    ),
    note="One unsafe question is N/A, so that 441 questions and 1323 rewrites are asked where the paper counts 442 and "
    "1326; 51 rewrites (17 questions) equal the question, and 34 of them repeat another.",
)
LLAVA = Dataset(
    name="llava",
    title="LLaVA-1.5's instruction data (Liu et al., CVPR 2024)",
    use="training",
    licence=SEE,
    page="https://github.com/haotian-liu/LLaVA/blob/main/docs/Data.md",
    size="665 thousand conversations, about 350 thousand pictures",
    files=(
        File(
            "llava/llava_v1_5_mix665k.json",
            "llava_v1_5_mix665k.json",
            source={"format": "llava", "images": "llava"},
        ),
    ),
    pictures={"llava": "coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K, vg/VG_100K_2"},
)
SPA_VL = Dataset(
    name="spa_vl",
    title="SPA-VL (Zhang et al., CVPR 2025)",
    use="training, evaluation",
    licence="CC BY 4.0",
    page="https://huggingface.co/datasets/sqrti/SPA-VL",
    size="4.1 GB: 93,258 preferences to train on, 7000 to validate with, 2 × 265 test questions",
    hub="hf://sqrti/SPA-VL",
    splits=(HubSplit("test", "harm", 265), HubSplit("test", "help", 265)),
    note="It is read where the hub's cache has it, as configs/eval/spa_vl.yaml does.",
)
FIGSTEP = Dataset(
    name="figstep",
    title="FigStep's SafeBench (Gong et al., AAAI 2025)",
    use="evaluation",
    licence="MIT",
    page="https://github.com/ThuCCSLab/FigStep",
    size="500 instructions",
    files=(
        File(
            "figstep/safebench.csv",
            "data/question/safebench.csv",
            records=500,
            source={"format": "figstep", "variant": "text_only"},
            url=f"{GITHUB}/ThuCCSLab/FigStep/main/data/question/safebench.csv",
        ),
        File(
            "figstep/SafeBench-Tiny.csv",
            "data/question/SafeBench-Tiny.csv",
            records=50,
            source={"format": "figstep", "variant": "text_only"},
            url=f"{GITHUB}/ThuCCSLab/FigStep/main/data/question/SafeBench-Tiny.csv",
            optional=True,
        ),
    ),
    pictures={"figstep/SafeBench": "data/images/SafeBench/: 500 pictures, query_ForbidQI_CATEGORY_TASK_6.png"},
    note="Without the pictures, `pictures: typeset` makes our own on first use.",
)
MM_SAFETYBENCH = Dataset(
    name="mm_safetybench",
    title="MM-SafetyBench (Liu et al., ECCV 2024)",
    use="evaluation",
    licence=SEE,
    page="https://github.com/isXinLiu/MM-SafetyBench",
    size="1680 questions in 13 scenarios, three pictures each",
    files=(
        File(
            "mm_safetybench/processed_questions",
            "data/processed_questions/: a JSON file a scenario",
            records=1680,
            source={"format": "mm_safetybench", "images": "mm_safetybench/imgs"},
        ),
        File("mm_safetybench/TinyVersion_ID_List.json", "the ids of the tiny version", optional=True),
    ),
    pictures={"mm_safetybench/imgs": "SCENARIO/{SD,SD_TYPO,TYPO}/ID.jpg"},
    note="The hub has the same questions, pictures inside; a configuration a scenario, splits SD, SD_TYPO, TYPO "
    "and Text_only: `mirage data get hf://PKU-Alignment/MM-SafetyBench`.",
)
SAFE_ERASER = Dataset(
    name="safe_eraser",
    title="SafeEraser (Chen et al., ACL Findings 2025)",
    use="training, evaluation",
    licence=SEE,
    page="https://github.com/yuu250/SafeEraser",
    size="3000 pictures, 28.8 thousand questions",
    files=(
        File(
            "safe_eraser/all_train.json",
            "all_train.json of safeeraser_dataset.zip",
            source={"format": "safe_eraser"},
        ),
        File(
            "safe_eraser/all_val.json",
            "all_val.json of safeeraser_dataset.zip",
            source={"format": "safe_eraser"},
        ),
    ),
    pictures={"safe_eraser/img": "img/", "safe_eraser/pdset": "pdset/, the harmless pictures"},
)
TEXTVQA = Dataset(
    name="textvqa",
    title="TextVQA (Singh et al., CVPR 2019)",
    use="evaluation",
    licence="CC BY 4.0",
    page="https://textvqa.org/dataset/",
    size="5000 questions, 6.6 GB of pictures",
    files=(
        File(
            "textvqa/llava_textvqa_val_v051_ocr.jsonl",
            "of LLaVA's eval.zip: questions with OCR tokens",
            records=5000,
            source={
                "format": "textvqa",
                "images": "textvqa/train_images",
                "annotations": "textvqa/TextVQA_0.5.1_val.json",
            },
        ),
        File("textvqa/TextVQA_0.5.1_val.json", "the official answers"),
    ),
    pictures={"textvqa/train_images": "train_val_images.zip"},
)
VIZWIZ = Dataset(
    name="vizwiz",
    title="VizWiz (Gurari et al., CVPR 2018)",
    use="evaluation",
    licence="CC BY 4.0",
    page="https://vizwiz.org/tasks-and-datasets/vqa/",
    size="4319 questions",
    files=(
        File(
            "vizwiz/val.json",
            "of Annotations.zip",
            records=4319,
            source={"format": "vizwiz", "images": "vizwiz/val"},
        ),
    ),
    pictures={"vizwiz/val": "val.zip"},
)
SCIENCEQA = Dataset(
    name="scienceqa",
    title="ScienceQA (Lu et al., NeurIPS 2022)",
    use="evaluation",
    licence="CC BY-NC-SA 4.0",
    page="https://scienceqa.github.io",
    size="4241 questions",
    files=(
        File(
            "scienceqa/llava_test_CQM-A.json",
            "of LLaVA's eval.zip",
            records=4241,
            source={
                "format": "scienceqa",
                "images": "scienceqa/images/test",
                "annotations": "scienceqa/problems.json",
            },
        ),
        File("scienceqa/problems.json", "the official problems"),
    ),
    pictures={"scienceqa/images/test": "test.zip"},
)
VQAV2 = Dataset(
    name="vqav2",
    title="VQAv2 (Goyal et al., CVPR 2017)",
    use="evaluation",
    licence="CC BY 4.0 (annotations)",
    page="https://visualqa.org/download.html",
    size="214,354 questions",
    files=(
        File(
            "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
            "the validation questions",
            records=214_354,
            source={
                "format": "vqav2",
                "images": "vqav2/val2014",
                "annotations": "vqav2/v2_mscoco_val2014_annotations.json",
            },
        ),
        File("vqav2/v2_mscoco_val2014_annotations.json", "the validation answers"),
    ),
    pictures={"vqav2/val2014": "COCO's val2014.zip"},
)

GQA = Dataset(
    name="gqa",
    title="GQA (Hudson and Manning, CVPR 2019)",
    use="evaluation",
    licence=SEE,
    page="https://cs.stanford.edu/people/dorarad/gqa/download.html",
    size="12,578 questions, 20 GB of pictures",
    files=(
        File(
            "gqa/llava_gqa_testdev_balanced.jsonl",
            "of LLaVA's eval.zip",
            records=12_578,
            source={
                "format": "gqa",
                "images": "gqa/images",
                "annotations": "gqa/testdev_balanced_questions.json",
            },
        ),
        File("gqa/testdev_balanced_questions.json", "of questions1.2.zip: the official questions and answers"),
    ),
    pictures={"gqa/images": "images.zip"},
)
POPE = Dataset(
    name="pope",
    title="POPE (Li et al., EMNLP 2023)",
    use="evaluation",
    licence="MIT",
    page="https://github.com/AoiDragon/POPE",
    size="9000 questions on 500 pictures of COCO",
    files=(
        File(
            "pope/llava_pope_test.jsonl",
            "of LLaVA's eval.zip",
            records=9000,
            source={"format": "pope", "images": "pope/val2014", "annotations": "pope/coco"},
        ),
        *(
            File(
                f"pope/coco/coco_pope_{name}.json",
                f"output/coco/coco_pope_{name}.json",
                records=3000,
                url=f"{GITHUB}/AoiDragon/POPE/main/output/coco/coco_pope_{name}.json",
            )
            for name in ("adversarial", "popular", "random")
        ),
    ),
    pictures={"pope/coco": "the three files of labels", "pope/val2014": "COCO's val2014.zip"},
    note="Older copies of the random questions and labels have 2910 of the 3000, 8910 questions in all.",
)
MME = Dataset(
    name="mme",
    title="MME (Fu et al., 2023)",
    use="evaluation",
    licence="for academic research only; on request",
    page="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
    size="two questions on each of 1187 pictures",
    files=(
        File(
            "mme/llava_mme.jsonl",
            "of LLaVA's eval.zip",
            source={
                "format": "mme",
                "images": "mme/MME_Benchmark_release_version",
                "annotations": "mme/MME_Benchmark_release_version",
            },
        ),
    ),
    pictures={"mme/MME_Benchmark_release_version": "the official folder: 14 tasks, pictures and their answers"},
    note="The hub's table lmms-lab/MME is read without other files: {format: mme, path: hf://lmms-lab/MME}.",
)

DATASETS = {
    one.name: one
    for one in (
        *(VLGUARD, ATTACKS, LLAVA, SPA_VL, FIGSTEP, MM_SAFETYBENCH, SAFE_ERASER),
        *(TEXTVQA, VIZWIZ, SCIENCEQA, VQAV2, GQA, POPE, MME),
    )
}
