"""What is published of each recipe in configs/train/, value by value, and the tables of docs/recipes.md made of it.

Sources: scripts/v1_5/*.sh, llava/train/*.py and data/*.py of github.com/OPTML-Group/VLM-Safety-Unlearn (the paper's
repository); TOFU/config/forget.yaml of github.com/licong-lin/negative-preference-optimization; run_rmu_zephyr and
rmu/unlearn.py of github.com/centerforaisafety/wmdp; configs/, scripts/ and community/ of
github.com/locuslab/open-unlearning; baselines/ of github.com/RebelsNLU-jaist/llm-unlearning. "Trainer" is transformers
4.37, on which the first two rest, and a later one of the same defaults.
`python tests/published_recipes.py` prints the tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mirage_dist import config as configs
from mirage_dist.schema import TrainRecipe

# llava/conversation.py of github.com/haotian-liu/LLaVA: conv_vicuna_v1.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ADAMW = {"name": "adamw", "betas": [0.9, 0.999]}


@dataclass(frozen=True)
class Value:
    """A value of a recipe. published: in words, where it is not ours; why: what that means."""

    key: str
    ours: Any
    source: str
    published: str | None = None
    why: str = ""


COMMON = [
    Value(
        *("model.path", "models/llava-1.5-7b-hf", "--model_name_or_path", "liuhaotian/llava-v1.5-7b"),
        why="the same weights, in transformers' form",
    ),
    Value("model.train", ["decoder", "connector"], "train.py: all but the vision tower"),
    Value("model.gradient_checkpointing", True, "--gradient_checkpointing True"),
    Value("data.system_prompt", VICUNA, "--version v1"),
    Value("data.max_length", 2048, "--model_max_length 2048"),
    Value("data.on_long", "truncate_turns", "llava_arch.py: rows are cut at model_max_length"),
    Value("data.image_aspect", "pad", "--image_aspect_ratio pad"),
    Value("data.group_by_modality", True, "--group_by_modality_length True"),
    Value(
        *("data.group_by_length", False, "--group_by_modality_length True", "by length inside a step"),
        why="which changes no step of ours",
    ),
    Value("data.workers", 4, "--dataloader_num_workers 4"),
    Value("train.dtype", "bf16", "--bf16 True"),
    Value("train.optimizer", ADAMW, "Trainer: adamw_torch"),
    Value("train.weight_decay", 0.0, "--weight_decay 0."),
    Value("train.clip", 0.0, "zero3.json has no gradient_clipping, so DeepSpeed clips nothing"),
    Value("train.warmup", 0.03, "--warmup_ratio 0.03"),
    Value("train.warmup_from_zero", True, "Trainer: step 0 has rate 0"),
    Value("train.schedule", "cosine", "--lr_scheduler_type cosine"),
    Value("train.decay", 1.0, "Trainer"),
    Value("train.min_lr", 0.0, "Trainer"),
    Value("deepspeed", "configs/deepspeed/zero3.json", "--deepspeed ./scripts/zero3.json"),
    Value("seed", 0, "Trainer", "42", "the order of samples is another in any case"),
]
LORA = [
    Value("model.lora.rank", 128, "--lora_r 128"),
    Value("model.lora.alpha", 256, "--lora_alpha 256"),
    Value("model.lora.dropout", 0.05, "train.py: lora_dropout"),
    Value("model.lora.targets", ["decoder"], "train.py: all 7 linear layers of each block, not the LM head"),
    Value("model.lora.load_in_4bit", False, "train.py: bits 16"),
    Value("model.lora.also_train", ["connector"], "--mm_projector_lr: the projector trains whole"),
]
# Of LLaVA's model and data, where another model's code is run on them.
LLAVAS = [
    Value("model.path", "models/llava-1.5-7b-hf", "", "another model", "the paper's"),
    Value("model.gradient_checkpointing", True, "", "", "as in the paper's scripts"),
    Value("data.system_prompt", VICUNA, "", "", "as in the paper's scripts"),
    Value("data.max_length", 2048, "", "", "as in the paper's scripts"),
    Value("data.on_long", "truncate_turns", "", "", "as in the paper's scripts"),
    Value("data.image_aspect", "pad", "", "", "as in the paper's scripts"),
    Value("data.group_by_modality", False, "a plain order"),
    Value("data.group_by_length", False, "a plain order"),
    Value("data.workers", 4, "", "", "as in the paper's scripts"),
    Value("train.clip", 0.0, "no clipping"),
]
CONVERSATIONS = "data/sft/conversations.jsonl"
HELPFUL = "data/sft/helpful.jsonl"
FORGET, RETAIN, TEXT = (f"data/prepared/{name}.jsonl" for name in ("forget", "retain", "forget_text"))
IDK = "data/prepared/idk.jsonl"
HARVESTED = "what the base model answers; refusals and N/A are left out and counted"
SFT = [
    Value(
        *("objective.name", "sft", "train_mem.py", "the token mean of each GPU's rows, averaged over GPUs"),
        why="the mean over all response tokens of the step",
    ),
    Value(
        "data.streams.train", [CONVERSATIONS, HELPFUL], "VLGuard's Post-hoc: 2000 conversations, 5000 helpful samples"
    ),
    Value("train.lr", 2e-5, "--learning_rate 2e-5"),
    Value("train.epochs", 1.0, "--num_train_epochs 1"),
    Value("train.global_batch", 128, "--per_device_train_batch_size 16 × 8 GPUs"),
]
NPO = [
    Value("objective.name", "npo", "--unlearn_type npo"),
    Value("objective.reduction", "batch_mean", "llava_unlearn_full_trainer.py: of batches' mean cross entropies"),
    Value("objective.forget_weight", 1.0, "--npo_forget_alpha 1.0"),
    Value("objective.retain", "ce", "llava_unlearn_full_trainer.py"),
    Value("objective.ce_weight", 1.0, "--npo_llava_loss_weight 1.0"),
    Value(
        *("data.streams.forget", [FORGET], "train_forget.json"),
        *("1023 samples, 14 of them asking N/A; of four models' answers the most harmful by a judge", HARVESTED),
    ),
    Value("data.streams.retain_ce", [RETAIN], "train_retain_mixed.json, 2000 samples"),
    Value("train.epoch_stream", "retain_ce", "the Trainer's own samples; the forget iterator starts again"),
    Value("train.global_batch", 8, "--per_device_train_batch_size 1 × 8 GPUs"),
    Value("train.micro_batch", 1, "--per_device_train_batch_size 1"),
]
RMU = [
    Value("objective.name", "rmu", "--unlearn_type rmu"),
    Value("objective.coeff", 10.0, "--rmu_steering_coeffs 10"),
    Value(
        *("data.streams.forget", [TEXT], "train_forget_qa_full.json: question, newline, answer, as the question"),
        *("1023 samples, as for NPO", HARVESTED),
    ),
    Value("data.streams.retain", [RETAIN], "train_retain_mixed.json, 2000 samples"),
]
EIGHT = [
    Value("train.lr", 1.1e-5, "--learning_rate 1.1e-5, --mm_projector_lr 1.1e-5"),
    Value(
        *("train.max_steps", 320, "--num_train_epochs 10: 32 steps for 2000 samples", "320, each 32nd of 16 samples"),
        why="all of 64",
    ),
    Value("train.global_batch", 64, "--per_device_train_batch_size 8 × 8 GPUs"),
    Value("train.micro_batch", 8, "--per_device_train_batch_size 8"),
]

# RMU as its own authors and those of adaptive RMU run it: on one GPU, without DeepSpeed and without a schedule.
ALONE = [
    Value("model.path", "models/llava-1.5-7b-hf", "model", "zephyr-7b-beta", "the paper's model"),
    Value("data.streams.forget", [TEXT], "--forget_corpora", "texts about the hazard", "the paper's data"),
    Value("data.streams.retain", [RETAIN], "--retain_corpora", "wikitext", "the paper's data"),
    Value("objective.ce_weight", 0.0, "no cross entropy"),
    Value("objective.positions", "all", "mse_loss over a whole batch"),
    Value("train.lr", 5e-5, "--lr 5e-5"),
    Value("train.max_steps", 150, "--max_num_batches 150 (80 to 150 in the paper)"),
    Value("train.global_batch", 4, "--batch_size 4"),
    Value("train.micro_batch", 4, "--batch_size 4"),
    Value("train.optimizer", ADAMW, "torch.optim.AdamW"),
    Value("train.weight_decay", 0.01, "torch.optim.AdamW"),
    Value(
        *("train.dtype", "bf16", "rmu/utils.py: torch_dtype", "bf16, what trains included"),
        why="with a float32 copy of what trains",
    ),
    Value(
        *("deepspeed", "configs/deepspeed/zero3.json", "rmu/unlearn.py", "no DeepSpeed"),
        why="the same numbers on one GPU",
    ),
    Value("train.decay", 1.0, "no schedule"),
    Value("train.min_lr", 0.0, "no schedule"),
    Value("train.warmup", 0.0, "no schedule"),
    Value("train.warmup_from_zero", False, "no schedule"),
    Value("train.schedule", "constant", "no schedule"),
    Value("seed", 0, "--seed", "42", "the order of samples is another in any case"),
]
# open-unlearning's, on which SimNPO, DPO, WGA, SatImp and UNDIAL are run: of TOFU, on a Llama of a few billions.
OPEN_UNLEARNING = [
    Value("model.path", "models/llava-1.5-7b-hf", "model", "Llama-3.2-1B-Instruct", "the paper's"),
    Value(
        *("model.train", ["decoder", "connector"], "default.yaml", "the whole language model"),
        why="and the projector, never the vision tower",
    ),
    Value("data.group_by_modality", False, "the Trainer's plain order"),
    Value("data.group_by_length", False, "the Trainer's plain order"),
    Value("data.streams.forget", [FORGET], "forget_split", "TOFU's forget10", "the paper's data"),
    Value("data.streams.retain", [RETAIN], "retain_split", "TOFU's retain90", "the paper's data"),
    Value("objective.forget_weight", 1.0, "gamma: 1.0"),
    Value("objective.retain", "ce", "retain_loss_type: NLL"),
    Value("objective.retain_weight", 1.0, "alpha: 1.0"),
    Value("train.lr", 1e-5, "tofu/default.yaml: learning_rate 1e-5"),
    Value("train.epochs", 10.0, "tofu/default.yaml: num_train_epochs 10"),
    Value("train.epoch_stream", "forget", "tofu/default.yaml: anchor forget"),
    Value("train.global_batch", 32, "tofu_unlearn.sh: 4 rows, 4 accumulated, 2 GPUs"),
    Value("train.optimizer", ADAMW, "finetune.yaml", "paged_adamw_32bit", "the same update"),
    Value("train.weight_decay", 0.01, "tofu/default.yaml: weight_decay 0.01"),
    Value("train.clip", 0.0, "default_config.yaml: DeepSpeed without gradient_clipping"),
    Value("train.warmup", 0.1, "warmup_epochs 1.0, of 10"),
    Value("train.schedule", "linear", "Trainer"),
]
# The methods that their authors added to it, without DeepSpeed on one GPU.
COMMUNITY = [
    Value("train.global_batch", 32, "run.sh: 16 rows, 2 accumulated"),
    Value("train.clip", 1.0, "Trainer: max_grad_norm"),
]


def merged(*parts: list[Value]) -> list[Value]:
    """Later values in place of earlier ones of the same key."""
    return list({value.key: value for part in parts for value in part}.values())


# Recipe -> (what it is, where it is published, its values).
PUBLISHED: dict[str, tuple[str, str, list[Value]]] = {
    "sft_mixed": (
        "SFT Mixed",
        "scripts/v1_5/finetune.sh",
        merged(
            COMMON,
            SFT,
            [
                Value(
                    "model.path",
                    "models/vicuna-7b-v1.5-pretrained-projector",
                    "--model_name_or_path, --pretrain_mm_mlp_adapter",
                    "lmsys/vicuna-7b-v1.5 and the pretrained projector",
                    "both in one model, see above",
                ),
                Value(
                    "data.streams.train",
                    [CONVERSATIONS, "data/llava/llava_v1_5_mix665k.json"],
                    "VLGuard's Mixed: 2000 conversations in the instruction data",
                ),
                Value("train.global_batch", 128, "LLaVA's finetune.sh: 16 × 8 GPUs (the paper's copy: 1 × 8)"),
            ],
        ),
    ),
    "sft_posthoc": ("SFT Posthoc", "scripts/v1_5/finetune_task.sh", merged(COMMON, SFT)),
    "sft_lora": (
        "SFT by LoRA",
        "scripts/v1_5/finetune_task_lora.sh",
        merged(
            COMMON,
            SFT,
            LORA,
            [
                Value("train.lr", 2e-4, "--learning_rate 2e-4"),
                Value(
                    "train.groups",
                    [{"match": ["connector"], "lr": 2e-5, "weight_decay": None}],
                    "--mm_projector_lr 2e-5",
                ),
            ],
        ),
    ),
    "npo_parity": (
        "NPO, newest",
        "scripts/v1_5/finetune_unlearn_npo.sh",
        merged(
            COMMON,
            NPO,
            [
                Value("objective.beta", 0.9, "--npo_beta 0.9"),
                Value("objective.retain_weight", 1.0, "--npo_retain_alpha 1.0"),
                Value("data.streams.retain", [RETAIN], "train_retain_mixed.json, 2000 samples"),
                Value("train.lr", 5e-7, "--learning_rate 5e-7"),
                Value("train.epochs", 1.0, "--num_train_epochs 1: 250 updates"),
            ],
        ),
    ),
    "npo_first": (
        "NPO, first",
        "scripts/v1_5/finetune_unlearn.sh",
        merged(
            COMMON,
            NPO,
            [
                Value("objective.beta", 0.1, "--npo_beta 0.1"),
                Value("objective.retain_weight", 0.0, "train_unlearn_full.py: npo_retain_alpha"),
                Value("train.lr", 1e-6, "--learning_rate 10e-7"),
                Value("train.epochs", 10.0, "--num_train_epochs 10: 2500 updates"),
            ],
        ),
    ),
    "npo_lora": (
        "NPO by LoRA",
        "scripts/v1_5/finetune_unlearn_lora.sh",
        merged(
            COMMON,
            NPO,
            LORA,
            EIGHT,
            [
                Value("objective.beta", 0.7, "--npo_beta 0.7"),
                Value("objective.retain_weight", 0.0, "train_unlearn.py: npo_retain_alpha"),
                Value("train.epochs", 10.0, "--num_train_epochs 10"),
            ],
        ),
    ),
    "npo_tofu": (
        "NPO's own",
        "TOFU/config/forget.yaml",
        merged(
            COMMON,
            LLAVAS,
            [
                Value(
                    *("model.train", ["decoder", "connector"], "forget.py", "the whole language model"),
                    why="and the projector, never the vision tower",
                ),
                Value("train.dtype", "bf16", "forget.py: bf16=True"),
                Value("train.clip", 0.0, "ds_config.json has no gradient_clipping"),
                Value("deepspeed", "configs/deepspeed/zero3.json", "config/ds_config.json: ZeRO-3"),
                Value("objective.name", "npo", "forget_loss: npo_grad_diff"),
                Value("objective.beta", 0.1, "beta: 0.1"),
                Value("objective.reduction", "seq_sum", "dataloader.py: get_batch_loss"),
                Value("objective.forget_weight", 1.0, "npo_coeff: 1.0"),
                Value("objective.retain", "ce", "npo_grad_diff"),
                Value("objective.retain_weight", 1.0, "grad_diff_coeff: 1.0"),
                Value("data.streams.forget", [FORGET], "split", "TOFU's forget01", "the paper's data"),
                Value("data.streams.retain", [RETAIN], "retain_set", "TOFU's retain99", "the paper's data"),
                Value("train.lr", 1e-5, "lr: 1e-5"),
                Value("train.epochs", 10.0, "num_epochs: 10"),
                Value("train.epoch_stream", "forget", "forget.py"),
                Value("train.global_batch", 32, "batch_size: 4, gradient_accumulation_steps: 4, 2 GPUs"),
                Value("train.weight_decay", 0.01, "weight_decay: 0.01"),
                Value("train.optimizer", ADAMW, "forget.py", "paged_adamw_32bit", "the same update"),
                Value("train.warmup", 0.1, "warmup_steps: steps_per_epoch, of 10"),
                Value("train.schedule", "linear", "Trainer"),
                Value("model.path", "models/llava-1.5-7b-hf", "model_family", "llama2-7b", "the paper's model"),
                Value("train.warmup_from_zero", True, "Trainer: step 0 has rate 0"),
                Value("seed", 0, "seed", "1001", "the order of samples is another in any case"),
            ],
        ),
    ),
    "rmu_parity": (
        "RMU, the paper's",
        "scripts/v1_5/finetune_unlearn.sh, --unlearn_type rmu",
        merged(
            COMMON,
            RMU,
            [
                Value(
                    "model.train",
                    ["decoder.layers.[567].mlp.down_proj.weight", "connector"],
                    "--rmu_layer_ids 5,6,7 --rmu_param_ids 6; the projector since commit a92902f",
                ),
                Value("objective.layer", 7, "--rmu_layer_id 7"),
                Value("objective.retain_weight", 1.0, "--rmu_retain_alpha 1.0"),
                Value("objective.ce_weight", 1.0, "--rmu_llava_loss_weight 1.0"),
                Value("objective.positions", "unpadded", "mse_loss over a batch of one row, which has no padding"),
                Value("objective.average", "sequences", "one row a GPU, averaged over GPUs"),
                Value("objective.ce_average", "sequences", "one row a GPU, averaged over GPUs"),
                Value("objective.ce_stream", "retain_ce", "the Trainer's own batch"),
                Value("data.streams.retain_ce", [RETAIN], "train_retain_mixed.json, 2000 samples"),
                Value("train.lr", 1e-6, "--learning_rate 10e-7"),
                Value("train.max_steps", 250, "2500, of which 2250 are skipped without an error"),
                Value("train.schedule_steps", 2500, "--num_train_epochs 10"),
                Value("train.global_batch", 8, "--per_device_train_batch_size 1 × 8 GPUs"),
                Value("train.micro_batch", 1, "--per_device_train_batch_size 1"),
            ],
        ),
    ),
    "rmu_lora": (
        "RMU by LoRA",
        "scripts/v1_5/finetune_unlearn_lora.sh, --unlearn_type rmu",
        merged(
            COMMON,
            RMU,
            LORA,
            EIGHT,
            [
                Value("objective.layer", 15, "--rmu_layer_id 15"),
                Value("objective.retain_weight", 0.0, "--rmu_retain_alpha 0"),
                Value("objective.ce_weight", 1.2, "--rmu_llava_loss_weight 1.2"),
                Value(
                    "objective.positions",
                    "all",
                    "mse_loss over a whole batch",
                    "padding of the forget rows alone",
                    "padding of forget and retain rows, which are one batch here",
                ),
            ],
        ),
    ),
    "rmu_original": (
        "RMU's own",
        "run_rmu_zephyr, rmu/unlearn.py",
        merged(
            COMMON,
            RMU,
            LLAVAS,
            ALONE,
            [
                Value("model.train", ["decoder.layers.[567].mlp.down_proj.weight"], "layer_ids 5,6,7, param_ids 6"),
                Value("objective.name", "rmu", "rmu/unlearn.py"),
                Value("objective.layer", 7, "layer_id 7"),
                Value("objective.coeff", 6.5, "--steering_coeffs 6.5,6.5 (6.5 to 20 in the paper)"),
                Value("objective.retain_weight", 1200.0, "--alpha 1200,1200 (100 to 1200 in the paper)"),
            ],
        ),
    ),
    "simnpo": (
        "SimNPO",
        "trainer/SimNPO.yaml, open-unlearning",
        merged(
            COMMON,
            LLAVAS,
            OPEN_UNLEARNING,
            [
                Value("objective.name", "simnpo", "handler: SimNPO"),
                Value("objective.beta", 4.5, "beta: 4.5"),
                Value("objective.gamma", 0.0, "delta: 0.0"),
                Value("objective.forget_weight", 0.125, "gamma: 0.125"),
            ],
        ),
    ),
    "idk_dpo": (
        "DPO towards ignorance",
        "trainer/DPO.yaml, open-unlearning",
        merged(
            COMMON,
            LLAVAS,
            OPEN_UNLEARNING,
            [
                Value("objective.name", "idk_dpo", "handler: DPO"),
                Value("objective.beta", 0.1, "beta: 0.1"),
                Value("data.streams.idk", [IDK], "idontknow.jsonl", "TOFU's hundred sentences", "twelve of ours"),
            ],
        ),
    ),
    "wga": (
        "WGA",
        "trainer/WGA.yaml, open-unlearning",
        merged(
            COMMON,
            LLAVAS,
            OPEN_UNLEARNING,
            COMMUNITY,
            [Value("objective.name", "wga", "handler: WGA"), Value("objective.beta", 1.0, "beta: 1.0")],
        ),
    ),
    "satimp": (
        "SatImp",
        "trainer/SatImp.yaml, open-unlearning",
        merged(
            COMMON,
            LLAVAS,
            OPEN_UNLEARNING,
            COMMUNITY,
            [
                Value("objective.name", "satimp", "handler: SatImp"),
                Value("objective.beta1", 5.0, "beta1: 5.0"),
                Value("objective.beta2", 1.0, "beta2: 1.0"),
                Value("objective.forget_weight", 0.1, "gamma: 0.1"),
            ],
        ),
    ),
    "undial": (
        "UNDIAL",
        "community/methods/UNDIAL/README.md, open-unlearning",
        [
            value
            for value in merged(
                COMMON,
                LLAVAS,
                OPEN_UNLEARNING,
                COMMUNITY,
                [
                    Value("objective.name", "undial", "handler: UNDIAL"),
                    Value("objective.beta", 10.0, "beta: 10.0"),
                    Value("objective.retain", "none", "alpha: 0.0"),
                    Value("model.lora.rank", 8, "README.md: rank=8"),
                    Value("model.lora.alpha", 16, "README.md: alpha=16"),
                    Value("model.lora.dropout", 0.0, "README.md", "not given", "none"),
                    Value(
                        "model.lora.targets", ["decoder"], "README.md", "not given", "all 7 linear layers of each block"
                    ),
                    Value("model.lora.load_in_4bit", False, "README.md: LoRA"),
                    Value("model.lora.also_train", [], "README.md: LoRA"),
                    Value("train.lr", 1e-4, "README.md: learning rate of 1e-4"),
                ],
            )
            if value.key not in ("data.streams.retain", "objective.retain_weight")
        ],
    ),
    "rmu_adaptive": (
        "Adaptive RMU",
        "baselines/adap_rmu/unlearn.py",
        merged(
            COMMON,
            RMU,
            LLAVAS,
            ALONE,
            [
                Value("model.train", ["decoder.layers.[567].mlp.down_proj.weight"], "--layer_ids 5,6,7, --param_ids 6"),
                Value("objective.name", "rmu", "run_adaptive_rmu"),
                Value("objective.layer", 7, "--layer_id 7"),
                Value("objective.coeff", 5.0, "--scale 5.0"),
                Value(
                    *("objective.coeff_of", "reference_norm", "run_adaptive_rmu", "mean norm of a topic's first batch"),
                    why="of the same position, the paper's formula",
                ),
                Value("objective.retain_weight", 1200.0, "--alpha 1200,1200"),
            ],
        ),
    ),
}
# Updates of a run on the published numbers of samples.
SIZES = {"forget": 1023, "idk": 1023, "retain": 2000, "retain_ce": 2000}
UPDATES = {
    "npo_parity": 250,
    "npo_first": 2500,
    "npo_lora": 320,
    "npo_tofu": 320,  # 319 theirs, which round down
    "rmu_parity": 250,
    "rmu_lora": 320,
    "rmu_original": 150,
    "simnpo": 320,
    "idk_dpo": 320,
    "wga": 320,
    "satimp": 320,
    "undial": 320,
    "rmu_adaptive": 150,
}
# Keys that decide no published number: where a run reports, how a step is cut up, what is kept.
OURS = (
    *("run", "monitor", "world", "reference", "model.attention", "data.packing", "data.refusals_in_forget"),
    *("train.save_every", "train.save_in_background", "train.keep_last", "train.keep_every", "train.keep_best"),
    *("train.max_restarts", "train.hang_seconds", "train.nonfinite_patience", "train.export"),
)
# A recipe of ours -> the published one that it departs from.
DEPARTS = {
    "sft": "sft_posthoc",
    "sft_filtered": "sft_posthoc",
    "sft_diversified": "sft_posthoc",
    "npo": "npo_tofu",
    "rmu": "rmu_parity",
}


def load(name: str) -> TrainRecipe:
    return configs.load(f"configs/train/{name}.yaml", [], TrainRecipe)


def value(recipe: TrainRecipe, key: str) -> Any:
    """A value of a recipe; of a stream the paths of its files."""
    if key.startswith("data.streams."):
        return [source.path for source in recipe.data.streams[key.removeprefix("data.streams.")]]
    return configs.value(recipe, key)


def shown(content: Any) -> str:
    """A value in a table."""
    if content == VICUNA:
        return "Vicuna's"
    if isinstance(content, list) and all(isinstance(item, str) for item in content):
        return ", ".join(f"`{item}`" for item in content)
    return f"`{content if isinstance(content, str) else json.dumps(content)}`"


def table(values: list[Value]) -> str:
    """Published values beside ours. A sign of equality stands for the published one."""
    lines = ["| key | published | ours | source |", "|---|---|---|---|"]
    for one in values:
        theirs = shown(one.ours) if one.published is None else one.published
        ours = "=" if one.published is None else f"{shown(one.ours)}: {one.why}"
        lines.append(f"| `{one.key}` | {theirs} | {ours} | {one.source} |")
    return "\n".join(lines)


def own(name: str) -> list[Value]:
    """What a published recipe has beside the values of all scripts."""
    return [one for one in PUBLISHED[name][2] if one not in COMMON]


def flat(content: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value, through mappings."""
    if isinstance(content, dict) and content and not key.endswith("optimizer"):
        return {k: v for name, part in content.items() for k, v in flat(part, f"{key}.{name}".lstrip(".")).items()}
    return {key: content}


def departures(name: str) -> str:
    """The table of a recipe of ours: all that differs from the published one."""
    theirs, ours = (load(which) for which in (DEPARTS[name], name))
    one, other = (decided(recipe) for recipe in (theirs, ours))
    lines = [f"| key | `{DEPARTS[name]}.yaml` | `{name}.yaml` |", "|---|---|---|"]
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            lines.append(f"| `{key}` | {shown(one.get(key))} | {shown(other.get(key))} |")
    return "\n".join(lines)


def decided(recipe: TrainRecipe) -> dict[str, Any]:
    """Dotted key -> value of all that decides a run's numbers."""
    tree = configs.to_dict(recipe)
    del tree["data"]["streams"]
    values = flat(tree) | {f"data.streams.{n}": value(recipe, f"data.streams.{n}") for n in recipe.data.streams}
    return {key: part for key, part in values.items() if not key.startswith(OURS)}


def sections() -> dict[str, str]:
    """Heading -> table of every section of docs/recipes.md that has one."""
    published = {f"{title}: `{name}.yaml`": table(own(name)) for name, (title, _, _) in PUBLISHED.items()}
    return {"All scripts of the paper": table(COMMON)} | published | {f"`{n}.yaml`": departures(n) for n in DEPARTS}


if __name__ == "__main__":
    print("\n".join(f"### {heading}\n\n{made}\n" for heading, made in sections().items()))
