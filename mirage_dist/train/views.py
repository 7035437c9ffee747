"""From a micro-batch to the views that an objective takes: one forward of the policy, and at most one of the reference.

Neither computes more than the objective needs: the forwards end after the last tapped layer unless an output of the LM
head is needed, only the rows that go on are computed above a tapped layer, and a reference whose lower layers are the
policy's starts at the first layer that differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_dist.model import activations
from mirage_dist.model.activations import Narrow
from mirage_dist.model.policy import Distilled, Outputs, Request
from mirage_dist.model.reference import Reference, shared_layer
from mirage_dist.objectives.base import Needs, View
from mirage_dist.train.feed import MicroBatch


class Views:
    """Makes the views of a micro-batch.

    engine: the policy's. reference: None when the objective compares with none.
    """

    def __init__(self, engine: Any, needs: Needs, reference: Reference | None) -> None:
        self.engine, self.needs, self.reference = engine, needs, reference
        self.narrows = activations.is_plain(engine.module.backbone)  # whether some rows of a batch may go on alone
        self.share = None  # the layer whose input the reference takes from the policy's forward
        activations_only = needs.ref_activation and not needs.ref_logp and not needs.distributions
        if reference is not None and activations_only:
            self.share = shared_layer(engine.module, min(needs.layers))

    def __call__(self, micro: MicroBatch) -> dict[str, View]:
        """The view of every stream. Every rank calls this the same number of times (ZeRO-3)."""
        needs, inputs = self.needs, micro.batch.inputs
        ref = Outputs()
        if self.reference is not None and self.share is None:
            ref = self.reference.outputs(inputs, self.reference_request(micro), micro.samples_of(needs.ref_logp))
        out = self.engine(inputs, self.policy_request(micro, ref.logits_MV))
        compared = self.compared(micro)
        if self.reference is not None and out.prefix is not None:
            prefix = out.prefix if compared is None else out.prefix.of(compared)
            ref = self.reference.outputs(inputs, Request(layers=needs.layers, prefix=prefix), [])
        logp = _by_stream(out.logp_N, micro.tokens, needs.logp)
        ref_logp = _by_stream(ref.logp_N, micro.tokens, needs.ref_logp)
        kl = _by_stream(out.kl_M, micro.kl_sizes, needs.kl)
        distilled = _by_stream(out.distilled_N, micro.tokens, needs.distil)
        segment_BS = micro.batch.segment_BS
        kept = _tapped(out, micro, needs.activation, None)
        ref_kept = _tapped(ref, micro, needs.ref_activation, compared)
        return {
            name: View(
                sequences=micro.sequences(name),
                segment_N=micro.segment(name),
                logp_N=logp.get(name),
                ref_logp_N=ref_logp.get(name),
                kl_M=kl.get(name),
                distilled_N=distilled.get(name),
                activations_BSD=kept.get(name, {}),
                ref_activations_BSD=ref_kept.get(name, {}),
                mask_BS=micro.of_stream(name, micro.mask_BS),
                segment_BS=micro.of_stream(name, segment_BS) - micro.rows[name].start,
            )
            for name in micro.rows
        }

    def policy_request(self, micro: MicroBatch, ref_logits_MV: Tensor | None) -> Request:
        """What the policy computes; above the tapped layers only for the rows that the LM head needs."""
        needs = self.needs
        rows = micro.span((*needs.logp, *needs.distributions)) if self.narrows else None
        narrow = None if rows is None or not needs.layers else Narrow(max(needs.layers) + 1, rows)
        layers = needs.layers if needs.activation else ()
        index_N, labels_N = micro.index(needs.logp), micro.labels(needs.logp)
        kl_index_M, distilled = micro.kl_index_M, None
        if (soft_N := micro.index(needs.distil)) is not None and ref_logits_MV is not None:
            # The reference's logits are those of the KL's positions, then of the response tokens to distil.
            of_kl, of_soft = ref_logits_MV.tensor_split([len(ref_logits_MV) - len(soft_N)])
            ref_logits_MV = None if kl_index_M is None else of_kl
            labels_M = micro.labels(needs.distil)
            assert labels_M is not None
            distilled = Distilled(soft_N, labels_M, of_soft, needs.penalty)
        own = Request(index_N, labels_N, kl_index_M, ref_logits_MV, layers, narrow, self.share)
        return own._replace(distilled=distilled)

    def reference_request(self, micro: MicroBatch) -> Request:
        """What the reference computes; above its first layer only for the rows that are compared."""
        needs, rows = self.needs, self.compared(micro)
        layers = needs.layers if needs.ref_activation else ()
        narrow = None if rows is None else Narrow(1, rows)
        index_N, labels_N = micro.index(needs.ref_logp), micro.labels(needs.ref_logp)
        parts = [part for part in (micro.kl_index_M, micro.index(needs.distil)) if part is not None]
        logits_M = torch.cat(parts) if parts else None
        return Request(index_N, labels_N, logits_M, layers=layers, narrow=narrow)

    def compared(self, micro: MicroBatch) -> slice | None:
        """The rows that are compared with the reference; None for all of them."""
        needs = self.needs
        return micro.span((*needs.ref_logp, *needs.distributions, *needs.ref_activation)) if self.narrows else None


def _by_stream(values_N: Tensor | None, sizes: Mapping[str, int], streams: Sequence[str]) -> dict[str, Tensor]:
    """Split values that stand stream after stream; sizes: how many of them each has."""
    if values_N is None:
        return {}
    names = [name for name in sizes if name in streams]
    return dict(zip(names, values_N.split([sizes[name] for name in names]), strict=True))


def _tapped(
    outputs: Outputs, micro: MicroBatch, streams: Sequence[str], computed: slice | None
) -> dict[str, Mapping[int, Tensor]]:
    """Activations by stream and layer. computed: the rows that went on from some layer, None for all of them."""
    taps = {}
    for layer, values_BSD in (outputs.activations_BSD or {}).items():
        narrowed = computed is not None and len(values_BSD) < len(micro.samples)
        taps[layer] = values_BSD, computed.start if computed is not None and narrowed else 0
    return {
        name: {layer: micro.of_stream(name, values_BSD, first) for layer, (values_BSD, first) in taps.items()}
        for name in streams
    }
