"""The contestants that bench_peers.py compares, and the process that runs one.

python benchmarks/peers_rank.py TASK     # started by bench_peers.py; TASK is JSON, see `main`

The opponents run in processes that import nothing of this package, so that their memory is theirs alone.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
from common import MIB
from step_rank import keep_blocks, resident

IGNORE = -100  # of labels: cross entropy's own default
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # with these set, accelerate would start a job of one process

Turn = Callable[[], dict[str, Any]]


def main(task: Mapping[str, Any]) -> None:
    """Load, then take a turn when requested (see `common.requests`).

    task: `case` (SFT, NPO, evaluation), `version` (a key of VERSIONS), `lora`, `model` (a directory), `place` (the
    folder of data), `out` (a new folder), `device`, `dtype`, `batch`, `steps`, and for a step `packing` (ours), `rows`
    (see `peers_data.write_rows`), `adapted` (names of the layers that adapters wrap) and `trl` (a folder that has it).
    """
    keep_blocks(MIB)
    if task["version"] != "ours":
        for name in LAUNCHED:
            os.environ.pop(name, None)
    if task.get("trl"):
        sys.path.append(task["trl"])  # after this environment's own packages
    VERSIONS[task["version"]](task, Turns(task))


class Turns:
    """The commands of this process: `load`, `turn`, `memory` and, for our steps, `profile`."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self.cuda = task["device"] == "cuda"
        self.requests = common.requests()
        self.before = resident("VmRSS")
        self.send: Callable[[Any], None] = next(self.requests)[1]  # of `load`, the first command
        self.begun = 0.0, 0.0

    def loaded(self, **values: Any) -> None:
        """Answer `load`."""
        self.send(values)

    def await_turn(self, turn: Turn | None = None) -> bool:
        """Answer other commands until a turn is requested, whose clock then runs. False when no further one comes.

        turn: what `profile` profiles.
        """
        for word, send in self.requests:
            if word == "turn":
                self.send, self.begun = send, (time.perf_counter(), time.process_time())
                return True
            send(self.memory() if word == "memory" else profile(turn, self.cuda))
        return False

    def end_turn(self, values: Mapping[str, Any]) -> None:
        """Stop the clock and answer. Tensors become numbers after that."""
        self.synchronize()
        start, worked = self.begun
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
        self.send({**spent, **{name: getattr(v, "tolist", lambda v=v: v)() for name, v in values.items()}})

    def take(self, turn: Turn) -> None:
        """Take every turn that is requested."""
        while self.await_turn(turn):
            self.end_turn(turn())

    def synchronize(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        """Peak memory so far, and from now on malloc may keep blocks: new pages cost time."""
        keep_blocks(32 * MIB)
        if self.cuda:
            import torch

            from mirage_dist.train.measures import usage

            return {"peak_mib": usage.highest(torch.device("cuda"))[0] / MIB}
        return {"peak_mib": resident("VmHWM") / MIB, "before_mib": self.before / MIB}


def profile(turn: Turn | None, cuda: bool) -> dict[str, str]:
    """Where the time of a turn goes, by operation."""
    import torch

    assert turn is not None
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as profiler:
        turn()
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return {"table": profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)}


# ------------------------------------------------------------------------------------------------ a step


def our_step(task: Mapping[str, Any], turns: Turns) -> None:
    """The step of `mirage train`. `reference_seconds`: what the reference's log-probabilities of all samples took."""
    import peers_data
    import step_rank

    from mirage_dist import ranks
    from mirage_dist.train.run import reference_of

    run = step_rank.our_run(peers_data.train_recipe(task, task["packing"]), ranks.start())
    start = time.perf_counter()
    step = step_rank.our_step(run, reference_of(run))
    turns.loaded(reference_seconds=time.perf_counter() - start)
    numbers = iter(range(task["steps"]))
    turns.take(lambda: {"loss": step(next(numbers))[0]})


def trainer_step(task: Mapping[str, Any], turns: Turns) -> None:
    """transformers' Trainer, padded, on the model's own loss."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    hf, tokenizer = loaded(task)
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)
    arguments = TrainingArguments(**settings(task), remove_unused_columns=False)
    train(Trainer(hf, arguments, collate, [row for step in steps_of(task) for row in step["train"]]), turns)


def trl_step(task: Mapping[str, Any], turns: Turns, padding_free: bool = False) -> None:
    """TRL's SFTTrainer on rows that are tokenised already. padding_free: a batch is one row, without padding."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    hf, tokenizer = loaded(task)
    prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = SFTConfig(**settings(task), **prepared, padding_free=padding_free)
    rows = Dataset.from_list([row for step in steps_of(task) for row in step["train"]])
    train(SFTTrainer(hf, arguments, train_dataset=rows, processing_class=tokenizer), turns)


def trl_padding_free_step(task: Mapping[str, Any], turns: Turns) -> None:
    trl_step(task, turns, padding_free=True)


def open_unlearning_step(task: Mapping[str, Any], turns: Turns) -> None:
    """NPO as open-unlearning computes it (github.com/locuslab/open-unlearning, src/trainer/unlearn/npo.py, and
    compute_batch_nll and compute_dpo_loss of src/trainer/utils.py), written anew.

    A Trainer whose loss takes three forwards with full logits: policy and frozen reference on forget, policy on retain.
    The forget forwards are spared the model's own loss, which open-unlearning computes and does not use. Its reference
    is a second copy of the model; with adapters it is the policy without them, which costs no memory.
    """
    import torch
    import torch.nn.functional as F
    from peers_data import BETA
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    hf, tokenizer = loaded(task)
    padded = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)
    reference = None if task["lora"] else copy.deepcopy(hf).requires_grad_(False).eval()

    def nll(model: Any, inputs: Mapping[str, Any]) -> Any:
        """−log π(y|x) of each sequence: (B,)."""
        logits_BSV = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        shifted_BVS, targets_BS = logits_BSV[:, :-1].transpose(1, 2), inputs["labels"][:, 1:]
        return F.cross_entropy(shifted_BVS, targets_BS, ignore_index=IGNORE, reduction="none").sum(1)

    class NPO(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_options: Any) -> Any:
            forget, retain = inputs["forget"], inputs["retain"]
            now_B = nll(model, forget)
            with torch.no_grad(), model.disable_adapter() if reference is None else nullcontext():
                before_B = nll(model if reference is None else reference, forget)
            loss = -2 / BETA * F.logsigmoid(BETA * (now_B - before_B)).mean() + model(**retain).loss
            return (loss, None) if return_outputs else loss

    def collate(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: padded([pair[name] for pair in pairs]) for name in ("forget", "retain")}

    rows = [
        {"forget": forget, "retain": retain}
        for step in steps_of(task)
        for forget, retain in zip(step["forget"], step["retain"], strict=True)
    ]
    arguments = TrainingArguments(**settings(task, len(rows) // task["steps"]), remove_unused_columns=False)
    train(NPO(hf, arguments, collate, rows), turns)


def steps_of(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of every step, by stream."""
    return json.loads(Path(task["rows"]).read_text())


def loaded(task: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model, with adapters where the task has them, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Parameters that train are float32 in every version; bf16 is then the dtype of what is computed.
    frozen = torch.bfloat16 if task["dtype"] == "bf16" and task["lora"] else torch.float32
    hf: Any = AutoModelForCausalLM.from_pretrained(task["model"], dtype=frozen)
    if task["lora"]:
        import peft
        from peers_data import LORA

        torch.manual_seed(0)  # the same adapters as ours
        options = peft.LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=task["adapted"]
        )
        hf = peft.get_peft_model(hf, options)
    return hf, AutoTokenizer.from_pretrained(task["model"], padding_side="right")


def settings(task: Mapping[str, Any], batch: int | None = None) -> dict[str, Any]:
    """TrainingArguments: those of our recipe, and nothing that costs time besides the step."""
    from peers_data import LEARNING_RATE

    cuda = task["device"] == "cuda"
    return {
        "output_dir": task["out"],
        "max_steps": task["steps"],
        "per_device_train_batch_size": batch or task["batch"],
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": task["dtype"] == "bf16",
        "gradient_checkpointing": False,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def train(trainer: Any, turns: Turns) -> None:
    """`trainer.train()`, one step a turn: the fetching of the batch and the update are part of it."""
    from transformers import TrainerCallback

    losses: list[Any] = []
    training_step = trainer.training_step

    def observed(*values: Any, **options: Any) -> Any:
        losses.append(training_step(*values, **options))
        return losses[-1]

    class OneStepATurn(TrainerCallback):
        def on_train_begin(self, *_values: Any, **_options: Any) -> None:
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            turns.loaded(trained=trained)
            turns.await_turn()

        def on_step_end(self, *_values: Any, **_options: Any) -> None:
            turns.end_turn({"loss": losses.pop()})
            if not turns.await_turn():
                sys.exit()

    trainer.training_step = observed
    trainer.add_callback(OneStepATurn())
    trainer.train()


# --------------------------------------------------------------------------------------------- evaluation


def our_answers(task: Mapping[str, Any], turns: Turns) -> None:
    """One worker of `mirage eval`: claims, batches of questions of similar length, and rows on disk."""
    import peers_data

    from mirage_dist.evals import rows, worker, worklist
    from mirage_dist.evals.models.hf import HuggingFace
    from mirage_dist.evals.sharing.claims import Claims

    recipe = peers_data.eval_recipe(task)
    generator = HuggingFace(recipe.model, recipe.template, recipe.generation)
    questions = rows.keyed(worklist.plan(recipe).questions, {})
    chunks = rows.chunks(questions, recipe.generation.batch_size)
    numbers = iter(range(1000))

    def turn() -> dict[str, Any]:
        suite = Path(task["out"]) / str(next(numbers))  # a new one: answers in the old one would be taken as they are
        with Claims(suite) as claims:
            answers = worker.work(suite, questions, chunks, claims, lambda: generator, (0, 1))
        return {"answers": {row["id"]: row["response"] for row in answers.of(questions)}}

    generator.answer([question.sample for question in questions.values()][:2])
    turns.loaded()
    turns.take(turn)


def generated_answers(task: Mapping[str, Any], turns: Turns) -> None:
    """transformers' `generate`, a fixed number of questions at a time, in the order of the file."""
    import torch
    from peers_data import NEW_TOKENS
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    dtype = torch.bfloat16 if task["dtype"] == "bf16" else torch.float32
    hf: Any = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).to(task["device"]).eval()
    samples = [json.loads(line) for line in (Path(task["place"]) / "questions.jsonl").read_text().splitlines()]

    @torch.inference_mode()
    def answers(part: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        chats = [[{"role": "user", "content": sample["question"]}] for sample in part]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        inputs = tokenizer.apply_chat_template(chats, **options).to(task["device"])
        sequences = hf.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = sequences[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        yield from zip((sample["id"] for sample in part), (text.strip() for text in texts), strict=True)

    def turn() -> dict[str, Any]:
        parts = [samples[start : start + task["batch"]] for start in range(0, len(samples), task["batch"])]
        return {"answers": dict(pair for part in parts for pair in answers(part))}

    list(answers(samples[:2]))
    turns.loaded()
    turns.take(turn)


VERSIONS: dict[str, Callable[[Mapping[str, Any], Turns], None]] = {
    "ours": lambda task, turns: (our_answers if task["case"] == "evaluation" else our_step)(task, turns),
    "transformers' Trainer": trainer_step,
    "TRL's SFTTrainer, padded": trl_step,
    "TRL's SFTTrainer, padding-free": trl_padding_free_step,
    "open-unlearning's NPO": open_unlearning_step,
    "generate, one at a time": generated_answers,
    "generate, best batch": generated_answers,
}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
