"""Floating-point operations of a step: those of matrix products, two for each multiplication and addition.

The modules of the model itself are counted, so that a family needs no formula of its own. A product of a matrix with
each of T tokens costs 2 · elements · T forward; its backward costs as much for the matrix where it trains, and as much
for its input where anything below trains. Attention costs 4 · S² · heads · head size a layer forward and twice that
backward (scores and values, every position with every other one, as PaLM counts: Chowdhery et al., 2022, appendix B).
Norms, activations and the optimizer are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mirage_dist.model.families import roles
from mirage_dist.model.reference import shared_layer
from mirage_dist.objectives.base import Needs
from mirage_dist.train.planning.costs.lengths import Lengths


@dataclass(frozen=True)
class Matrices:
    """Elements of the matrices that a token of one part is multiplied by.

    all: of every one. trained: of those that train. through: of those whose input needs a gradient.
    """

    all: int = 0
    trained: int = 0
    through: int = 0

    def forward(self, tokens: float) -> float:
        return 2 * self.all * tokens

    def backward(self, tokens: float) -> float:
        return 2 * (self.trained + self.through) * tokens

    def __add__(self, other: Matrices) -> Matrices:
        return Matrices(self.all + other.all, self.trained + other.trained, self.through + other.through)


@dataclass(frozen=True)
class Work:
    """What a token goes through. attention, tower_attention: heads times head size, summed over layers.

    below: whether a gradient goes through the decoder's attention down to its first layer's input. patches: tokens of
    the tower for one picture; picture_tokens: those that the decoder takes. reference: elements and attention of what
    the reference computes of the decoder, as a share of the decoder.
    """

    decoder: Matrices
    connector: Matrices
    tower: Matrices
    head: Matrices
    attention: int
    attention_back: int
    tower_attention: int
    patches: int
    picture_tokens: int
    reference: float = 1.0


@dataclass(frozen=True)
class Operations:
    """Of one row. recomputed: what checkpointing computes a second time; head: of the loss head, all passes."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0
    head: float = 0.0
    tower: float = 0.0

    @property
    def model(self) -> float:
        """Without what is computed twice: the operations that MFU counts."""
        return self.forward + self.backward + self.head + self.tower

    @property
    def all(self) -> float:
        return self.model + self.recomputed

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))

    def __mul__(self, factor: float) -> Operations:
        return Operations(*(getattr(self, n) * factor for n in self.__dataclass_fields__))


def work(policy: Any, needs: Needs, checkpointing: bool) -> Work:
    """Count a model on the meta device, with adapters and requires_grad as in training."""
    base = policy.base
    parts, text, tower = roles.Parts(base), roles.decoder(policy.backbone), roles.encoder(base, "image")
    trains = {id(p) for p in base.parameters() if p.requires_grad}
    head = base.get_output_embeddings()
    embeddings = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)} - {id(head.weight)}
    role_of = {id(p): parts.role_of[name] for name, p in base.named_parameters()}
    layer_of = {id(p): number for number, module in enumerate(text.layers) for p in module.parameters()}
    share = _share(base.config.get_text_config())
    counted: dict[str, list[tuple[int, int, bool]]] = {"decoder": [], "connector": [], "vision": []}
    for key, elements in _matrices(base, head, embeddings, share):
        role = role_of[key]
        if role in counted:  # sounds are in no data of ours
            counted[role].append((layer_of.get(key, -1), elements, key in trains))
    others = [p for p in base.parameters() if p.requires_grad and id(p) not in layer_of and id(p) != id(head.weight)]
    outside = {id(p) for p in (*text.norm.parameters(),)} if hasattr(text, "norm") else set()
    under = any(id(p) not in outside for p in others)  # projector, tower or embeddings
    lowest = min((layer_of[i] for i in trains if i in layer_of), default=len(text.layers))
    first = 0 if under or checkpointing else lowest
    config = text.config
    per_layer = _attention(config)
    tower_config = getattr(tower, "config", None)
    trained_tower = any(trained for _, _, trained in counted["vision"])
    patches, tokens = _picture(base.config, tower_config)
    begin = (
        shared_layer(policy, min(needs.layers))
        if needs.ref_activation and not (needs.ref_logp or needs.distributions)
        else 0
    )
    depth = needs.reference_depth or len(text.layers)
    return Work(
        decoder=_sum(counted["decoder"], first),
        connector=_connector(counted["connector"], trained_tower),
        tower=_sum(counted["vision"], 0 if trained_tower else None),
        head=Matrices(head.weight.numel(), head.weight.numel() * head.weight.requires_grad, head.weight.numel()),
        attention=per_layer * len(text.layers),
        attention_back=per_layer * (len(text.layers) - first),
        tower_attention=_attention(tower_config) * _depth(tower_config),
        patches=patches,
        picture_tokens=tokens,
        reference=max(0, depth - (begin or 0)) / len(text.layers),
    )


def row(
    own: Work,
    lengths: Lengths,
    width: float | None,
    rows: float,
    checkpointing: bool,
    cached: bool,
    together: float | None = None,
) -> Operations:
    """Of the policy, for a mean row of a stream. rows: of the loss head.

    width: of a padded row; None where rows are packed. cached: the tower's features come from `data.cache_vision`.
    together: see `step`.
    """
    tokens, square = _extent(lengths, width, together)
    scores = 4 * square
    pictures = lengths.pictured * own.picture_tokens
    forward = own.decoder.forward(tokens) + scores * own.attention + own.connector.forward(pictures)
    backward = own.decoder.backward(tokens) + 2 * scores * own.attention_back + own.connector.backward(pictures)
    patches = lengths.pictured * own.patches
    tower = 0.0
    if not cached:
        tower = own.tower.forward(patches) + 4 * own.patches * patches * own.tower_attention
        if own.tower.trained:
            tower += own.tower.backward(patches) + 8 * own.patches * patches * own.tower_attention
    again = own.decoder.forward(tokens) + scores * own.attention if checkpointing else 0.0
    return Operations(forward, backward, again, own.head.forward(rows) + own.head.backward(rows), tower)


def _extent(lengths: Lengths, width: float | None, together: float | None) -> tuple[float, float]:
    """Tokens of a mean row, and products of tokens that its attention computes."""
    if width is not None:
        return width, width**2
    return lengths.mean, lengths.square if together is None else lengths.mean * together


def reference_row(
    own: Work, lengths: Lengths, width: float | None, rows: float, cached: bool, together: float | None = None
) -> Operations:
    """Of the reference, for a mean row of a stream that is compared with it; see `row`."""
    tokens, square = _extent(lengths, width, together)
    forward = own.reference * (own.decoder.forward(tokens) + 4 * square * own.attention)
    tower = 0.0
    if own.reference == 1.0:  # else it starts from the policy's hidden states, or nearly so
        forward += own.connector.forward(lengths.pictured * own.picture_tokens)
        patches = lengths.pictured * own.patches
        tower = 0.0 if cached else own.tower.forward(patches) + 4 * own.patches * patches * own.tower_attention
    return Operations(forward, 0.0, 0.0, own.head.forward(rows), tower)


def _matrices(base: Any, head: nn.Module, embeddings: set[int], share: float) -> Iterator[tuple[int, int]]:
    """The id of each weight that tokens are multiplied by, and its elements; of experts, those that a token meets."""
    seen = {id(head.weight)}
    for name, parameter in base.named_parameters():
        key = id(parameter)
        if parameter.ndim < 2 or parameter.shape[0] == 1 or key in seen or key in embeddings:  # positions, class tokens
            continue
        seen.add(key)
        expert = ".experts." in name and ".shared_expert" not in name
        yield key, int(parameter.numel() * (share if expert else 1.0))


def _sum(counted: list[tuple[int, int, bool]], first: int | None) -> Matrices:
    """first: the layer from which on inputs need a gradient; None: nowhere."""
    every, trained = sum(n for _, n, _ in counted), sum(n for _, n, trains in counted if trains)
    through = 0 if first is None else sum(n for layer, n, _ in counted if first == 0 or layer >= first)
    return Matrices(every, trained, through)


def _connector(counted: list[tuple[int, int, bool]], tower_trains: bool) -> Matrices:
    """The gradient goes through all of its matrices but the first, and through that to a tower that trains."""
    whole = _sum(counted, 0)
    if tower_trains or not whole.trained:
        return whole if tower_trains else Matrices(whole.all)
    return Matrices(whole.all, whole.trained, whole.all - counted[0][1])


def _share(text: Any) -> float:
    """The share of a layer's experts that a token is sent to."""
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((getattr(text, n) for n in names if getattr(text, n, None)), 1)
    return chosen / max(number, chosen)


def _attention(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 0
    if not heads:
        return 0
    # The `hidden_size` of Qwen2-VL's tower is that of its output.
    width = getattr(config, "embed_dim", None) or getattr(config, "hidden_size", 0)
    return heads * (getattr(config, "head_dim", None) or width // heads)


def _depth(config: Any) -> int:
    return getattr(config, "num_hidden_layers", None) or getattr(config, "depth", None) or 0


def _picture(config: Any, tower: Any) -> tuple[int, int]:
    """Patches of a picture in the tower and tokens in the decoder; 0 where the picture's own size decides."""
    side, patch = (_side(getattr(tower, name, None)) for name in ("image_size", "patch_size"))
    patches = (side // patch) ** 2 if side and patch else 0
    return patches, getattr(config, "image_seq_length", None) or patches


def _side(size: int | Sequence[int] | None) -> int:
    """The longer side of a size that a configuration gives as one number or as two; 0 for none."""
    if size is None or isinstance(size, int):
        return size or 0
    return max(size, default=0)


def with_picture(own: Work, tokens: int) -> Work:
    """The same where a picture is known to take this many of the decoder's tokens."""
    if not tokens:
        return own
    if own.patches:
        return replace(own, patches=max(own.patches, tokens), picture_tokens=tokens)
    return replace(own, patches=4 * tokens, picture_tokens=tokens)  # 2 × 2 patches a token: Qwen-VL and its like


def step(
    own: Work,
    lengths: Mapping[str, Lengths],
    needs: Needs,
    rows: int,
    width: float | None,
    checkpointing: bool,
    reference: bool,
    cached: bool,
    together: float | None = None,
) -> tuple[Operations, Operations]:
    """Of policy and reference for `rows` rows of every stream. reference: whether it is computed in the step.

    together: tokens of a packed micro-batch whose attention computes all products of them, as without flash-attention.
    """
    policy, other = Operations(), Operations()
    for name, of_stream in lengths.items():
        everywhere = name in needs.kl and needs.kl_positions != "response"
        headed = of_stream.mean if everywhere else of_stream.response
        logits = headed if name in (*needs.logp, *needs.distributions) else 0.0
        policy += row(own, of_stream, width, logits, checkpointing, cached, together) * rows
        if reference and name in (*needs.ref_logp, *needs.distributions, *needs.ref_activation):
            logits = headed if name in (*needs.ref_logp, *needs.distributions) else 0.0
            other += reference_row(own, of_stream, width, logits, cached, together) * rows
    return policy, other
