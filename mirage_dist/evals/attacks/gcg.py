"""Greedy coordinate gradient: which tokens after a question make the model begin its answer with a target.

Zou et al. 2023, "Universal and transferable adversarial attacks on aligned language models" (arXiv 2307.15043),
algorithms 1 and 2: the loss is the mean negative log-probability of the target's tokens, averaged over samples. A step
computes its gradient with respect to the one-hot vectors of the suffix, takes for each position the `top_k` tokens that
should lower it most, evaluates `candidates` random single swaps among these, and keeps the best. Two things differ: the
current suffix competes too, so that the loss never rises, and a universal suffix is optimised on all samples at once
instead of adding them one by one. The evaluated prompt is the one that the model will receive: a candidate counts only
if tokenising the prompt with its text gives exactly its tokens.

Shapes: L suffix tokens, V vocabulary, A allowed tokens, C candidates, K top_k, D hidden size, S positions of a prompt
with its target, T target tokens, N predicted positions, B batch, I pictures, P patches, F features.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirage_dist.data.encoding.collate import IGNORE, Batch
from mirage_dist.data.encoding.control import SpelledControl
from mirage_dist.data.encoding.conversation import called
from mirage_dist.data.sample import Sample
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.models.memory import RowsAtOnce
from mirage_dist.model import vision
from mirage_dist.model.policy import HeadedModel, Request, differ_by, no_grad_forward
from mirage_dist.schema import ConfigError, RunError

STARTS = 200  # random suffixes that are drawn before the search gives up
WORD = re.compile(r"\w+(?:['-]\w+)*")  # of ASCII text
PLAIN = "!"  # repeated, it is the paper's initial suffix


class State(NamedTuple):
    """A suffix after `step` steps, and its loss."""

    step: int
    ids: list[int]
    loss: float


@dataclass
class Row:
    """One sample with the suffix in place and the target as its answer, in a batch of one.

    first: the position at which the suffix begins. index_T, labels_T: the positions that predict the target, and its
    tokens without the end token. bare: the same prompt's tokens without the picture, and where the suffix begins there.
    """

    sample: Sample
    inputs: dict[str, Tensor]
    first: int
    index_T: Tensor
    labels_T: Tensor
    bare: tuple[list[int], int]


class Victim:
    """The model under test, as a search uses it: log-probabilities, texts of tokens, and the allowed tokens.

    network: the module that is attacked. configured: how many candidates go through it at once, and rows: how many do
    since the memory did not suffice. avoid: words that no suffix may contain. Raises ConfigError when they leave no
    token.
    """

    def __init__(self, generator: HuggingFace, avoid: Sequence[str]) -> None:
        self.network = HeadedModel(generator.model).requires_grad_(False).eval()
        self.encoder, self.device, self.placed = generator.encoder, generator.device, generator.placed
        self.configured = generator.batch_size
        remedy = "leave this sample out or use a larger GPU"
        self.rows = RowsAtOnce(generator.batch_size, self.device, "the number of candidates evaluated at once", remedy)
        self.avoid = {word.lower() for word in avoid}
        self.allowed_A = self._allowed()

    def text(self, ids: Sequence[int]) -> str:
        return self.encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).strip()

    def tokens(self, sample: Sample, text: str) -> tuple[list[int], int]:
        """The tokens of the prompt and its answer, without the picture, and the position at which the answer begins."""
        batch = self.encoder.encode([_with_suffix(replace(sample, image=None), text)])
        labelled = (batch.labels_BS[0] != IGNORE).nonzero()
        return batch.inputs["input_ids"][0].tolist(), int(labelled[0])

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The inputs on the model's device; the picture's features replace the picture where the model supports it."""
        inputs = self.placed(batch.inputs)
        try:
            vision.check(self.network.base)
        except ConfigError:
            return inputs
        features = no_grad_forward(self.network, inputs, Request(vision=())).vision or {}
        shapes = {name: tensor.shape for name, tensor in inputs.items() if vision.is_pixels(name)}
        others = {name: tensor for name, tensor in inputs.items() if name not in shapes}
        replayed = {**others, **vision.replayed([features], [shapes])}
        difference = differ_by(self.network, self.network.depth, inputs, replayed)
        return replayed if difference <= vision.tolerance(self.network.base.dtype) else inputs

    def _allowed(self) -> Tensor:
        """The tokens that a suffix may contain, (A,): printable ASCII text, no special token, no word of `avoid`."""
        tokenizer = self.encoder.tokenizer
        size = min(len(tokenizer), self.network.base.get_input_embeddings().weight.shape[0])
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
        allowed = [i for i, text in enumerate(texts) if i not in special and self._is_allowed(text.strip())]
        if not allowed:
            raise ConfigError("avoid: leaves no token for a suffix")
        return torch.tensor(allowed)

    def _is_allowed(self, text: str) -> bool:
        return text != "" and text.isascii() and text.isprintable() and text.lower() not in self.avoid


class Problem:
    """The search for a suffix of `length` tokens for all these samples at once. Their answers are the targets.

    seed: of the random draws, together with the number of the step. Raises RunError when no suffix of that length
    survives as text.
    """

    def __init__(self, victim: Victim, samples: Sequence[Sample], length: int, seed: str) -> None:
        self.victim, self.network, self.device = victim, victim.network, victim.device
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
        score_LA = -self.gradient(state.ids)[:, self.victim.allowed_A]
        best_LK = self.victim.allowed_A[score_LA.topk(min(top_k, len(self.victim.allowed_A)), dim=1).indices.cpu()]
        draw = self._draw(state.step)
        places = torch.randint(self.length, (count,), generator=draw).tolist()
        ranks = torch.randint(best_LK.shape[1], (count,), generator=draw).tolist()
        swaps = {}
        for place, rank in zip(places, ranks, strict=True):
            ids = [*state.ids[:place], int(best_LK[place, rank]), *state.ids[place + 1 :]]
            swaps[tuple(ids)] = ids
        swaps.pop(tuple(state.ids), None)
        # A suffix that survives in one sample's prompt nearly always does in the others; the winner is checked in all.
        return [ids for ids in swaps.values() if self.survives(ids, self.rows[:1])]

    # ------------------------------------------------------------------------------------ loss and gradient

    def gradient(self, ids: Sequence[int]) -> Tensor:
        """The gradient of the loss with respect to the one-hot vectors of the suffix: (L, V), float32."""
        table_VD = self.network.base.get_input_embeddings().weight
        total_LD = torch.zeros(self.length, table_VD.shape[1], device=self.device)
        for row in self.rows:
            with self._embeddings() as outputs:
                loss = self._losses(row, torch.tensor([ids], device=self.device)).sum()
            (grad_1SD,) = torch.autograd.grad(loss, outputs[0])
            total_LD += grad_1SD[0, row.first : row.first + self.length].float()
        return total_LD @ table_VD.float().T / len(self.rows)

    @torch.no_grad()
    def losses(self, ids_CL: Tensor) -> Tensor:
        """The loss of each candidate: (C,), float32 on the CPU."""
        by_row = [self._in_parts(row, ids_CL.to(self.device)) for row in self.rows]
        return torch.stack(by_row).mean(0).float().cpu()

    def _in_parts(self, row: Row, ids_CL: Tensor) -> Tensor:
        """The losses of one sample's candidates, as many at once as the memory holds."""
        parts, start, at_once = list[Tensor](), 0, self.victim.rows
        while start < len(ids_CL):
            part = ids_CL[start : start + at_once.count]
            losses = at_once.attempt(partial(self._losses, row, part), len(part), called(row.sample))
            if losses is not None:
                parts.append(losses)
                start += len(part)
        return torch.cat(parts)

    def _losses(self, row: Row, ids_CL: Tensor) -> Tensor:
        count, width = len(ids_CL), row.inputs["input_ids"].shape[1]
        inputs = vision.repeated(row.inputs, count)
        inputs["input_ids"][:, row.first : row.first + self.length] = ids_CL
        starts_C1 = torch.arange(count, device=self.device).unsqueeze(1) * width
        index_N = (starts_C1 + row.index_T).flatten()
        logp_N = self.network(inputs, Request(index_N=index_N, labels_N=row.labels_T.repeat(count))).logp_N
        return -logp_N.view(count, -1).mean(1)

    @contextmanager
    def _embeddings(self) -> Iterator[list[Tensor]]:
        """The outputs of the token embedding, made leaves of the graph, since no weight requires a gradient."""
        outputs: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            outputs.append(output.detach().requires_grad_())
            return outputs[-1]

        handle = self.network.base.get_input_embeddings().register_forward_hook(keep)
        try:
            yield outputs
        finally:
            handle.remove()

    # --------------------------------------------------------------------------------------- tokens and text

    def survives(self, ids: Sequence[int], rows: Sequence[Row]) -> bool:
        """Whether the text of these tokens is allowed, and gives exactly these tokens again in each of the prompts."""
        text = self.victim.text(ids)
        if not self.victim.avoid.isdisjoint(WORD.findall(text.lower())):
            return False
        for row in rows:
            tokens, first = row.bare
            try:
                own = self.victim.tokens(row.sample, text)[0]
            except SpelledControl:  # the tokens together spell one
                return False
            if own != [*tokens[:first], *ids, *tokens[first + self.length :]]:
                return False
        return True

    def _row(self, sample: Sample, ids: Sequence[int]) -> Row:
        text = self.victim.text(ids)
        batch = self.victim.encoder.encode([_with_suffix(sample, text)])
        ((index_T, labels_T),) = last_answers(batch)
        before = int(index_T[0]) + 1
        first, bare = _last(batch.inputs["input_ids"][0, :before].tolist(), ids), self.victim.tokens(sample, text)
        bare_first = _last(bare[0][: bare[1]], ids)
        if first is None or bare_first is None:
            raise RunError(
                f"{sample.source}: sample {sample.id!r}: its prompt splits the suffix {text!r} into other tokens"
            )
        return Row(
            sample,
            self.victim.inputs(batch),
            first,
            index_T.to(self.device),
            labels_T.to(self.device),
            (bare[0], bare_first),
        )

    def _first(self) -> list[int]:
        """The initial suffix: the paper's, or else random tokens that survive as text in every prompt."""
        plain = self.victim.encoder.tokenizer(" ".join([PLAIN] * self.length), add_special_tokens=False)["input_ids"]
        allowed = set(self.victim.allowed_A.tolist())
        if len(plain) == self.length and allowed.issuperset(plain) and self._placed(plain):
            return plain
        draw = self._draw("start")
        for _ in range(STARTS):
            ids = self.victim.allowed_A[
                torch.randint(len(self.victim.allowed_A), (self.length,), generator=draw)
            ].tolist()
            if self._placed(ids):
                return ids
        raise RunError(f"none of {STARTS} random suffixes of {self.length} tokens gives the same tokens again as text")

    def _placed(self, ids: Sequence[int]) -> bool:
        """Whether every prompt with this suffix's text contains its tokens."""
        prompts = (self.victim.tokens(sample, self.victim.text(ids)) for sample in self.samples)
        return all(_last(tokens[:answer], ids) is not None for tokens, answer in prompts)

    def _draw(self, part: object) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {part}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def last_answers(batch: Batch, ended: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Of each row, the flat positions that predict its target, and the target's tokens: (T,).

    Of several answers (of earlier turns) the last one is the target. ended: with its end token.
    """
    made, labels_S = [], batch.labels_BS.flatten()
    for row in range(len(batch.labels_BS)):
        index_N = batch.index_N[batch.segment_N == row]
        answer = (index_N.diff(prepend=index_N[:1] - 1) != 1).nonzero()[-1:].flatten()
        index_T = index_N[int(answer) if len(answer) else 0 : None if ended else -1]
        made.append((index_T, labels_S[index_T + 1]))
    return made


def _with_suffix(sample: Sample, suffix: str) -> Sample:
    return replace(sample, question=f"{sample.question} {suffix}")


def _last(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """The last position at which `part` begins in `ids`."""
    for first in range(len(ids) - len(part), -1, -1):
        if list(ids[first : first + len(part)]) == list(part):
            return first
    return None
