"""Whether a family can be trained here, measured on a small model of its own classes with the real processor's batches.

What is measured, in log-probabilities of answers:
1. Batches with pictures, with some, and of text alone can be computed, and the loss head gives what the model's own
   forward gives.
2. A row does not depend on the others of its batch, padded on the right in training and on the left in generation. It
   does where an output of the processor belongs to tokens or rows, and is not carried with them.
3. The tokens of an answer do not see later ones, in training and in evaluation: a changed last token leaves the
   log-probabilities of the others as they are. It does not under prefix attention, which reads answers both ways.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_dist.data.encoding.collate import Batch, Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.model.families import by_row, configs, small
from mirage_dist.model.policy import HeadedModel, Request
from mirage_dist.schema import ConfigError

# In nats. A later token moves nothing at all where attention is causal; sums in another order stay below 1e-4.
LEAK, CARRIED = 1e-5, 1e-3
NEW_TOKENS = 2  # generated: what is carried wrongly may show after the first one only


class _Failed(Exception):
    """A step that raised an exception, in words."""


def fault(
    config: Any, encoder: Encoder, pictured: Sequence[Sample], text: Sequence[Sample], attention: str | None = None
) -> str | None:
    """Why models of this configuration are not right here, in a sentence with their name; None where they are.

    pictured, text: samples with and without pictures, two of a kind at most. attention: the implementation, None for
    transformers' choice. Raises ConfigError for a sample that cannot be encoded.
    """
    encoder = copy.copy(encoder)
    encoder.packing = False  # whether packed sequences stay apart is another question (`packing.fault`)
    reason = None
    for size in small.SIZES:
        before = reason
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                made = small.made(config, attention, size)
                by_row.keep_apart(made)
                model = HeadedModel(made)
                reason = next(_faults(model, encoder, pictured, text), None)
                break
        except ConfigError:
            raise
        except Exception as error:  # of any kind: a family's own code
            reason = str(error) if isinstance(error, _Failed) else f"no model can be made: {_brief(error)}"
            # What failed for want of something left out fails in another way, or not, in a larger model.
            if before is not None and _words(before) == _words(reason):
                break
    return None if reason is None else f"{config.model_type}: {reason}"


def _faults(model: HeadedModel, encoder: Encoder, pictured: Sequence[Sample], text: Sequence[Sample]) -> Iterator[str]:
    mixed = [*pictured[:1], *text[:1], *pictured[1:]] if pictured and text else []
    groups = {"pictured": pictured, "mixed": mixed, "text-only": text}
    groups = {name: samples for name, samples in groups.items() if samples}
    widest = max(groups, key=lambda name: len(groups[name]))
    batches = {s.digest(): encoder.encode([s]) for s in groups[widest]}
    alone = {digest: _logps(model, batch, "one-row") for digest, batch in batches.items()}
    for name, samples in groups.items():
        batch = encoder.encode(samples)
        logp_N = _logps(model, batch, name)
        rows = logp_N.split(torch.bincount(batch.segment_N, minlength=len(samples)).tolist())
        known = [(row, alone[s.digest()]) for s, row in zip(samples, rows, strict=True) if s.digest() in alone]
        if (off := max(_largest(row - own) for row, own in known)) > CARRIED:
            yield (
                f"in a {name} batch a row's log-probabilities depend on the other rows (by {off:.1e}): an output of "
                "the processor or the model is not carried by row"
            )
    # A row of a batch is what it is alone. So what follows needs no more than one row of each kind.
    for sample in [*pictured[:1], *text[:1]]:
        batch, logp_N = batches[sample.digest()], alone[sample.digest()]
        if (off := _largest(logp_N - _own_logps(model, batch, "one-row"))) > CARRIED:
            yield f"the model's own log-probabilities differ from the loss head's by {off:.1e}; it changes its logits"
        for training in (False, True):
            if (off := _leak(model, batch, None if training else logp_N, "one-row")) > LEAK:
                yield (
                    "answers see their own later tokens (a changed last token moves the log-probabilities of earlier "
                    f"ones by {off:.1e}{' in training' if training else ''}), as under prefix attention; such "
                    "log-probabilities are of no use for training"
                )
    logits_TBV = _logits(model, encoder, groups[widest], widest)
    for number, sample in enumerate(groups[widest]):
        if (off := _largest(logits_TBV[:, number] - _logits(model, encoder, [sample], "one-row")[:, 0])) > CARRIED:
            yield (
                f"in generation, with prompts padded on the left, a row of a {widest} batch depends on the other rows "
                f"(its logits by {off:.1e}): an output of the processor or the model is not carried by row"
            )


def _labels(batch: Batch) -> Tensor:
    return batch.labels_N % small.VOCABULARY


def _logps(model: HeadedModel, batch: Batch, name: str) -> Tensor:
    """Log-probabilities of the batch's labels by the loss head: (N,)."""
    torch.manual_seed(0)
    try:
        logp_N = model(batch.inputs, Request(batch.index_N, _labels(batch))).logp_N
    except Exception as error:
        raise _Failed(f"a {name} batch cannot be computed: {_brief(error)}") from error
    assert logp_N is not None
    return logp_N


def _own_logps(model: HeadedModel, batch: Batch, name: str) -> Tensor:
    """The same by the model's own forward."""
    try:
        logits_BSV = model.base(**batch.inputs, use_cache=False).logits
    except Exception as error:
        raise _Failed(f"a {name} batch cannot be computed: {_brief(error)}") from error
    logp_NV = logits_BSV.float().flatten(0, 1)[batch.index_N].log_softmax(1)
    return logp_NV.gather(1, _labels(batch).unsqueeze(1)).squeeze(1)


def _leak(model: HeadedModel, batch: Batch, before_N: Tensor | None, name: str) -> float:
    """How far the last token of every row's answer moves the log-probabilities of the others.

    before_N: these in evaluation, as computed before; None to compute all in training.
    """
    last_N = torch.cat([batch.segment_N[1:] != batch.segment_N[:-1], torch.tensor([True])])
    ids = batch.inputs["input_ids"].clone()
    places = batch.index_N[last_N] + 1
    # In their place the answers' first tokens: words that the family knows.
    first_N = torch.cat([torch.tensor([True]), last_N[:-1]])
    ids.view(-1)[places] = batch.labels_N[first_N]
    changed = copy.copy(batch)
    vars(changed)["inputs"] = {**batch.inputs, "input_ids": ids}
    model.train(before_N is None)
    try:
        before_N = _logps(model, batch, name) if before_N is None else before_N
        return _largest((before_N - _logps(model, changed, name))[~last_N])
    finally:
        model.eval()


def _logits(model: HeadedModel, encoder: Encoder, samples: Sequence[Sample], name: str) -> Tensor:
    """Logits of the tokens that the model generates after these prompts: (T, B, V)."""
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    model.base.generation_config.eos_token_id = None  # so that every row has as many
    options |= {"max_new_tokens": NEW_TOKENS, "pad_token_id": encoder.tokenizer.pad_token_id}
    prompts = encoder.prompts(samples)
    try:
        return torch.stack(model.base.generate(**prompts, **options).logits)
    except Exception as error:
        raise _Failed(f"no answer to a {name} batch of prompts can be generated: {_brief(error)}") from error


def _largest(difference: Tensor) -> float:
    """The largest absolute value; infinity where one is no number."""
    return float(difference.abs().nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def _words(reason: str) -> str:
    """A reason without its numbers, such as shapes."""
    return re.sub(r"\d+", "", reason)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {configs.brief(error)}"
