"""How likely a model finds given answers: the log-probability of each of their tokens, and whether it is the likeliest.

Teacher-forced: each token is scored after the prompt and the answer's own tokens before it, in rows that the encoder of
training makes (`data.encoding`), with the end token. Shapes: B rows, S positions, N tokens of all answers, D hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mirage_dist.data.encoding.conversation import called
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.gcg import last_answers
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.models.memory import RowsAtOnce
from mirage_dist.model.policy import HeadedModel
from mirage_dist.schema import RunError

LOGITS_MB = 128  # MiB of float32 logits that exist at a time


@dataclass(frozen=True)
class Answer:
    """One answer's tokens: log-probabilities, and whether each is the likeliest one (see `forgetting`)."""

    logps: list[float]
    greedy: list[bool]


class Likelihood:
    """The model of a generator as a scorer of answers. The generator answers as before."""

    def __init__(self, generator: HuggingFace) -> None:
        self.generator = generator
        self.network = HeadedModel(generator.model).requires_grad_(False).eval()
        remedy = "leave this sample out or use a larger GPU"
        self.rows = RowsAtOnce(
            generator.batch_size, generator.device, "the number of answers that are scored at once", remedy
        )

    def __call__(self, samples: Sequence[Sample], between: Callable[[], None] = lambda: None) -> list[Answer]:
        """Score each sample's last answer. between: is called before each batch, to stop.

        A batch that does not fit into memory is halved, and so are all later ones. Raises ConfigError naming a sample
        that cannot be encoded or is longer than template.max_length, RunError when a single one does not fit.
        """
        # Rows of a length beside each other, so that little is padding. The order changes no value.
        order = sorted(range(len(samples)), key=lambda i: (samples[i].image is None, len(samples[i].answer)))
        made: dict[int, Answer] = {}
        while len(made) < len(order):
            between()
            part = order[len(made) : len(made) + self.rows.count]
            batch = [samples[i] for i in part]
            where = f"{batch[0].source}, id {batch[0].id!r}"
            scored = self.rows.attempt(partial(self.batch, batch), len(batch), where)
            if scored is not None:
                made |= zip(part, scored, strict=True)
        return [made[i] for i in range(len(samples))]

    @torch.inference_mode()
    def batch(self, samples: Sequence[Sample]) -> list[Answer]:
        """Score the last answers of one batch."""
        batch = self.generator.encoder.encode(samples)
        targets, device = last_answers(batch, ended=True), self.generator.device
        counts = [len(label_T) for _, label_T in targets]
        index_N, label_N = (torch.cat(part).to(device) for part in zip(*targets, strict=True))
        hidden_BSD = self.network.backbone(**self.generator.placed(batch.inputs), use_cache=False).last_hidden_state
        logp_N, greedy_N = self._scores(hidden_BSD.flatten(0, 1)[index_N], label_N)
        made = []
        for sample, logp_T, greedy_T in zip(samples, logp_N.split(counts), greedy_N.split(counts), strict=True):
            if not logp_T.isfinite().all():
                raise RunError(
                    f"{called(sample)}: the model's logits are no finite numbers; choose model.dtype bf16 or fp32, or "
                    "look at the model's weights"
                )
            made.append(Answer(logp_T.tolist(), greedy_T.tolist()))
        return made

    def _scores(self, hidden_ND: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
        """log p of each label (N,) in float64, and whether it is the likeliest token, on the CPU.

        Logits exist of some rows at a time, in float32, with the family's soft cap.
        """
        head = self.network.base.get_output_embeddings()
        width = max(1, (LOGITS_MB << 20) // (4 * len(head.weight)))
        logps, greedy = [], []
        for rows_ND, labels in zip(hidden_ND.split(width), label_N.split(width), strict=True):
            logits_NV = head(rows_ND, exact=True)
            logps.append(logits_NV.log_softmax(1).gather(1, labels[:, None]).squeeze(1).double().cpu())
            greedy.append((logits_NV.argmax(1) == labels).cpu())
        return torch.cat(logps), torch.cat(greedy)
