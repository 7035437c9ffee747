"""Greedy coordinate gradient: which tokens behind a question make the model begin its answer with a target.

Zou et al. 2023, "Universal and transferable adversarial attacks on aligned language models" (arXiv 2307.15043),
algorithms 1 and 2: the loss is the mean negative log-probability of the target's tokens, averaged over samples. A step
takes its gradient with respect to the one-hot vectors of the suffix, finds the `top_k` tokens of each position that
should lower it most, evaluates `candidates` random single swaps among these, and keeps the best. Two things differ:
the suffix as it is competes too, so that the loss never rises, and a universal suffix is found on all samples at once,
not on one more of them at a time. What is scored is what will be asked: a candidate counts only if the prompt with its
text has exactly these tokens.

Shapes: L suffix tokens, V vocabulary, C candidates, S positions of a prompt with its target, T target tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirage_dist.data.encoding.collate import IGNORE, Batch
from mirage_dist.data.sample import Sample
from mirage_dist.data.words import FIRST_WORD
from mirage_dist.evals.models.generate import Generator
from mirage_dist.model import vision
from mirage_dist.model.policy import Policy, Request
from mirage_dist.schema import ConfigError, RunError

STARTS = 200  # random suffixes that are tried before none is said to survive
PLAIN = "!"  # the paper's first suffix repeats it


class State(NamedTuple):
    """A suffix after so many steps, and its loss."""

    step: int
    ids: list[int]
    loss: float


@dataclass
class Row:
    """One sample with the suffix in place, its target as answer, in a batch of one.

    first: where the suffix begins. index_T, labels_T: the positions that predict the target, and its tokens; its end
    token is not asked for. bare: the same prompt's tokens without picture, and where the suffix begins in them.
    """

    sample: Sample
    inputs: dict[str, Tensor]
    first: int
    index_T: Tensor
    labels_T: Tensor
    bare: tuple[list[int], int]


class Model:
    """The model under test as searches need it: its log-probabilities, its texts, and the tokens that may stand in one.

    avoid: words that no suffix may hold. Raises ConfigError where no token is left.
    """

    def __init__(self, generator: Generator, avoid: Sequence[str]) -> None:
        self.policy = Policy(generator.model).requires_grad_(False).eval()
        self.encoder, self.device, self.rows_at_once = generator.encoder, generator.device, generator.batch_size
        self.placed = generator.placed
        self.avoid = {word.lower() for word in avoid}
        self.allowed_A = self._allowed()

    def text(self, ids: Sequence[int]) -> str:
        return self.encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).strip()

    def tokens(self, sample: Sample, text: str) -> tuple[list[int], int]:
        """Those of the prompt without its picture, through the answer, and where the answer begins."""
        batch = self.encoder.encode([_asked(replace(sample, image=None), text)])
        labelled = (batch.labels_BS[0] != IGNORE).nonzero()
        return batch.inputs["input_ids"][0].tolist(), int(labelled[0])

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """On the model's device, with the picture's features in place of the picture where the model allows it."""
        inputs = self.placed(batch.inputs)
        try:
            vision.check(self.policy.base)
        except ConfigError:
            return inputs
        with torch.no_grad():
            features = self.policy(inputs, Request(vision=True)).vision_IPF
        return {**{n: t for n, t in inputs.items() if n != "pixel_values"}, vision.FEATURES: features}

    def _allowed(self) -> Tensor:
        """Tokens that a suffix may hold: printable ASCII text, no special token, no word of `avoid`."""
        tokenizer = self.encoder.tokenizer
        size = min(len(tokenizer), self.policy.base.get_input_embeddings().weight.shape[0])
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
        allowed = [i for i, text in enumerate(texts) if i not in special and self._may_stand(text.strip())]
        if not allowed:
            raise ConfigError("avoid: leaves no token for a suffix")
        return torch.tensor(allowed)

    def _may_stand(self, text: str) -> bool:
        return text != "" and text.isascii() and text.isprintable() and text.lower() not in self.avoid


class Problem:
    """What is searched: a suffix of `length` tokens for these samples at once. Their answers are the targets.

    seed: of the draws, with the number of the step. Raises RunError where no suffix of that length survives as text.
    """

    def __init__(self, model: Model, samples: Sequence[Sample], length: int, seed: str) -> None:
        self.model, self.policy, self.device = model, model.policy, model.device
        self.samples, self.length, self.seed = list(samples), length, seed
        self.first_ids = self._first()
        self.rows = [self._row(sample, self.first_ids) for sample in samples]

    # ------------------------------------------------------------------------------------------- search

    def start(self) -> State:
        return State(0, self.first_ids, self.losses(torch.tensor([self.first_ids]))[0].item())

    def step(self, state: State, candidates: int, top_k: int) -> State:
        """One step: never a higher loss than before."""
        tried = self.candidates(state, candidates, top_k)
        if not tried:
            return State(state.step + 1, state.ids, state.loss)
        losses_C = self.losses(torch.tensor(tried))
        for i in losses_C.argsort().tolist():
            if losses_C[i] >= state.loss:
                break
            if self.survives(tried[i], self.rows):
                return State(state.step + 1, tried[i], losses_C[i].item())
        return State(state.step + 1, state.ids, state.loss)

    def candidates(self, state: State, count: int, top_k: int) -> list[list[int]]:
        """Up to `count` different single swaps whose text has exactly their tokens."""
        score_LA = -self.gradient(state.ids)[:, self.model.allowed_A]
        best_LK = self.model.allowed_A[score_LA.topk(min(top_k, len(self.model.allowed_A)), dim=1).indices.cpu()]
        draw = self._draw(state.step)
        places = torch.randint(self.length, (count,), generator=draw).tolist()
        ranks = torch.randint(best_LK.shape[1], (count,), generator=draw).tolist()
        swaps = {}
        for place, rank in zip(places, ranks, strict=True):
            ids = [*state.ids[:place], int(best_LK[place, rank]), *state.ids[place + 1 :]]
            swaps[tuple(ids)] = ids
        swaps.pop(tuple(state.ids), None)
        # One sample's prompt tells nearly always; the winner is checked in all of them.
        return [ids for ids in swaps.values() if self.survives(ids, self.rows[:1])]

    # ------------------------------------------------------------------------------------ loss and gradient

    def gradient(self, ids: Sequence[int]) -> Tensor:
        """The loss's gradient with respect to the one-hot vectors of the suffix: (L, V), float32."""
        table_VD = self.policy.base.get_input_embeddings().weight
        total_LD = torch.zeros(self.length, table_VD.shape[1], device=self.device)
        for row in self.rows:
            with self._embeddings() as found:
                loss = self._losses(row, torch.tensor([ids], device=self.device)).sum()
            (grad_1SD,) = torch.autograd.grad(loss, found[0])
            total_LD += grad_1SD[0, row.first : row.first + self.length].float()
        return total_LD @ table_VD.float().T / len(self.rows)

    @torch.no_grad()
    def losses(self, ids_CL: Tensor) -> Tensor:
        """Of each candidate: (C,), float32 on the CPU."""
        parts = ids_CL.to(self.device).split(self.model.rows_at_once)
        by_row = [torch.cat([self._losses(row, part) for part in parts]) for row in self.rows]
        return torch.stack(by_row).mean(0).float().cpu()

    def _losses(self, row: Row, ids_CL: Tensor) -> Tensor:
        count, width = len(ids_CL), row.inputs["input_ids"].shape[1]
        inputs = {name: torch.cat([tensor] * count) for name, tensor in row.inputs.items()}
        inputs["input_ids"][:, row.first : row.first + self.length] = ids_CL
        starts_C1 = torch.arange(count, device=self.device).unsqueeze(1) * width
        index_N = (starts_C1 + row.index_T).flatten()
        logp_N = self.policy(inputs, Request(index_N=index_N, labels_N=row.labels_T.repeat(count))).logp_N
        return -logp_N.view(count, -1).mean(1)

    @contextmanager
    def _embeddings(self) -> Iterator[list[Tensor]]:
        """What the token embedding gives, as leaves of the graph: no weight of the model is one."""
        found: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            return found[-1]

        handle = self.policy.base.get_input_embeddings().register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    # --------------------------------------------------------------------------------------- tokens and text

    def survives(self, ids: Sequence[int], rows: Sequence[Row]) -> bool:
        """Whether the text of these tokens gives exactly them again, in each of these prompts, and may be asked."""
        text = self.model.text(ids)
        if self.model.avoid & {word.lower() for word in FIRST_WORD.findall(text)}:
            return False
        for row in rows:
            was, first = row.bare
            if self.model.tokens(row.sample, text)[0] != [*was[:first], *ids, *was[first + self.length :]]:
                return False
        return True

    def _row(self, sample: Sample, ids: Sequence[int]) -> Row:
        text = self.model.text(ids)
        batch = self.model.encoder.encode([_asked(sample, text)])
        # Of several answers (an earlier turn's) the last is the target; its end token is left out.
        index_N, labels_S = batch.index_N, batch.labels_BS.flatten()
        answer = (index_N.diff(prepend=index_N[:1] - 1) != 1).nonzero()[-1:].flatten()
        index_T = index_N[int(answer) if len(answer) else 0 : -1]
        before = int(index_T[0]) + 1
        first, bare = _last(batch.inputs["input_ids"][0, :before].tolist(), ids), self.model.tokens(sample, text)
        bare_first = _last(bare[0][: bare[1]], ids)
        if first is None or bare_first is None:
            raise RunError(f"{sample.source}: sample {sample.id!r}: its prompt splits the suffix {text!r} otherwise")
        return Row(
            sample,
            self.model.inputs(batch),
            first,
            index_T.to(self.device),
            labels_S[index_T + 1].to(self.device),
            (bare[0], bare_first),
        )

    def _first(self) -> list[int]:
        """The suffix to begin with: the paper's, or else random tokens that survive as text in every prompt."""
        plain = self.model.encoder.tokenizer(" ".join([PLAIN] * self.length), add_special_tokens=False)["input_ids"]
        allowed = set(self.model.allowed_A.tolist())
        if len(plain) == self.length and allowed.issuperset(plain) and self._placed(plain):
            return plain
        draw = self._draw("start")
        for _ in range(STARTS):
            ids = self.model.allowed_A[
                torch.randint(len(self.model.allowed_A), (self.length,), generator=draw)
            ].tolist()
            if self._placed(ids):
                return ids
        raise RunError(f"none of {STARTS} random suffixes of {self.length} tokens is the same tokens again as text")

    def _placed(self, ids: Sequence[int]) -> bool:
        """Whether every prompt with this suffix's text holds its tokens."""
        found = (self.model.tokens(sample, self.model.text(ids)) for sample in self.samples)
        return all(_last(bare[:answer], ids) is not None for bare, answer in found)

    def _draw(self, part: object) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {part}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _asked(sample: Sample, suffix: str) -> Sample:
    return replace(sample, question=f"{sample.question} {suffix}")


def _last(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """Where `part` begins for the last time in `ids`."""
    for first in range(len(ids) - len(part), -1, -1):
        if list(ids[first : first + len(part)]) == list(part):
            return first
    return None
