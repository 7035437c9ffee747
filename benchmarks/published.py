"""The paper's algorithms, written directly: the baselines of bench_step.py.

`policy` and `reference` are Hugging Face models or DeepSpeed engines around them, with full logits and one forward for
each batch. Each function returns the loss of one step. `Rows` are one stream's part of a micro-batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_dist.data.encoding.collate import IGNORE
from mirage_dist.train.feed import MicroBatch


class Rows(NamedTuple):
    """One stream's rows: the model's keyword arguments (one picture for each sample), and labels (B, S)."""

    inputs: dict[str, Any]
    labels_BS: Tensor


def rows(micro: MicroBatch, stream: str) -> Rows:
    part = micro.rows[stream]
    inputs: dict[str, Any] = {name: tensor[part] for name, tensor in micro.batch.inputs.items()}
    return Rows({**inputs, "use_cache": False}, micro.batch.labels_BS[part])


def sft(policy: Any, train: Rows) -> Tensor:
    """Token mean of the cross entropy, as the model computes it."""
    return policy(**train.inputs, labels=train.labels_BS).loss


def npo_formula(policy: Any, reference: Any, forget: Rows, retain: Rows, beta: float) -> Tensor:
    """NPO's loss in three forwards: −(2/β) mean log σ(−β (log π − log π_ref)), plus cross entropy on retain."""
    now_B = sequence_logps(policy, forget)
    with torch.no_grad():
        before_B = sequence_logps(reference, forget)
    return -2 / beta * F.logsigmoid(-beta * (now_B - before_B)).mean() + sft(policy, retain)


def npo_five(policy: Any, reference: Any, forget: Rows, retain: Rows, retain_ce: Rows, beta: float) -> Tensor:
    """The loss of the paper's code: five forwards, with mean cross entropies of batches (all weights 1)."""
    with torch.no_grad():
        before = [sft(reference, part) for part in (forget, retain)]
    rise_forget, rise_retain = (sft(policy, part) - b for part, b in zip((forget, retain), before, strict=True))
    margin = F.logsigmoid(beta * rise_retain) - F.logsigmoid(beta * rise_forget)
    return 2 / beta * margin + sft(policy, retain_ce)


def rmu(policy: Any, frozen: Any, forget: Rows, retain: Rows, layer: int, control_D: Tensor) -> Tensor:
    """Three full forwards with a hook on the tapped layer; logits are not used (retain weight 1, no cross entropy)."""
    steered_BSD, kept_BSD = (activation(policy, part, layer) for part in (forget, retain))
    with torch.no_grad():
        before_BSD = activation(frozen, retain, layer)
    control_BSD = control_D.to(steered_BSD).expand_as(steered_BSD)
    return F.mse_loss(steered_BSD, control_BSD) + F.mse_loss(kept_BSD, before_BSD)


def sequence_logps(model: Any, part: Rows) -> Tensor:
    """log π(y|x) of each sequence, from the full logits: (B,)."""
    logits_BSV = model(**part.inputs).logits.float()
    targets_BS = F.pad(part.labels_BS, (0, 1), value=IGNORE)[:, 1:]
    nll = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none", ignore_index=IGNORE)
    return -nll.view_as(targets_BS).sum(1)


def activation(model: Any, part: Rows, layer: int) -> Tensor:
    """The decoder layer's output (B, S, D) in a full forward."""
    hf = getattr(model, "module", model)
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    outputs: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = base.model.language_model.layers[layer].register_forward_hook(keep)
    try:
        model(**part.inputs)
    finally:
        handle.remove()
    return outputs[0]
