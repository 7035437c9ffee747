"""Packed sequences in one row: how a family's model takes them, and whether it keeps them apart.

Which models do is measured, not listed: a small model of the family's own classes and kinds of layers (see `small`)
computes some sequences alone and in one row (`fault`).

Shapes: T tokens of a row, R sequences in it, S tokens of the longest, A axes of a position (three in Qwen-VL).
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mirage_dist.data.encoding.collate import TOKEN_TYPES, Row
from mirage_dist.data.encoding.packing import BORDERS, borders, pack
from mirage_dist.model import activations, vision
from mirage_dist.model.families import attention, roles, small
from mirage_dist.model.families.attention import Heads

# Kinds of layers in which a token meets others by attention alone, which transformers masks.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
WINDOW = 4  # of sliding attention in what is measured, in tokens
BY_BORDERS = "mirage_by_borders"  # name of the attention that stands for flash-attention on any device
APART = "mirage_apart"  # name of sdpa that computes packed sequences one by one
# Share of a hidden state's size: rounding of float32 stays below 1e-5, a sequence that another one reaches above 1e-3.
TOLERANCE = 1e-4


@contextmanager
def entering(backbone: Any, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The backbone's keyword arguments for these inputs, packed or not, while the block runs its forward.

    Packed, positions are those that the family gives each sequence alone; and the borders reach the decoder only, since
    a vision tower would take them for the borders of its pictures.
    """
    given = {name: value for name, value in inputs.items() if name not in BORDERS}
    if len(given) == len(inputs):
        yield given
        return
    if hasattr(backbone, "get_rope_index") and given["position_ids"].ndim == 2:
        given["position_ids"] = _positions(backbone, given, inputs["cu_seq_lens_q"].diff().tolist())
    edges = {name: inputs[name] for name in BORDERS}
    text, borders_R = roles.decoder(backbone), edges["cu_seq_lens_q"]
    if text.config._attn_implementation == APART and by_flash(text.config, borders_R.device, text.dtype):
        # A mask of four dimensions is passed on as it is. transformers would make one of T × T elements, and have the
        # host wait for the GPU; this one has no element, so that attention that needs a mask fails.
        edges["attention_mask"] = borders_R.new_empty(1, 1, 0, 0, dtype=torch.bool)

    def add(_module: nn.Module, positional: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return positional, {**arguments, **edges}

    handle = text.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()


def attend_apart(backbone: Any) -> bool:
    """Let the decoder's sdpa compute each packed sequence by itself; whether this decoder does.

    Under transformers' block-diagonal mask sdpa computes all T × T products, also those that the mask removes: of 16
    sequences of one length, 15 of 16. Everything else is computed as before: in float32 on a GPU, where the borders
    would have to come to the host, without borders, in windows, and in decoders whose layers are not plain.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]  # with repeatable gradients, where `attention` has made them so

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, Any]:
        packed = given.get("cu_seq_lens_q") is not None and given.get("sliding_window") is None
        if packed and query.device.type == "cpu":
            return _one_by_one(query, key, value, given), None
        if packed and attention_mask is not None and not attention_mask.numel():  # as `entering` has decided
            options = {"dropout": given.get("dropout", 0.0), "scale": given.get("scaling")}
            borders_R = given["cu_seq_lens_q"]
            return attention.flash(query, key, value, borders_R, given["max_length_q"], **options), None
        return whole(module, query, key, value, attention_mask, **given)

    text = roles.decoder(backbone)
    if text.config._attn_implementation != "sdpa" or not activations.is_plain(backbone):
        return False
    AttentionInterface.register(APART, attend)
    AttentionMaskInterface.register(APART, sdpa_mask)
    text.config._attn_implementation = APART
    return True


def suits_flash(config: Any, dtype: torch.dtype) -> bool:
    """Whether PyTorch's flash-attention has kernels for packed sequences of such a decoder with sdpa.

    config: of the text decoder.
    """
    return (
        activations.plain(config)
        and getattr(config, "sliding_window", None) is None
        and attention.suits(Heads.of(config), dtype)
    )


def by_flash(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed sequences of such a decoder are computed one by one by PyTorch's flash-attention, without a mask.

    config: of the text decoder, whose attention is that of `attend_apart`.
    """
    return device.type == "cuda" and suits_flash(config, dtype) and attention.flashes(Heads.of(config), dtype)


def costly(config: Any, implementation: str | None, dtype: torch.dtype, planned: bool = False) -> str | None:
    """Why packed rows of this model cost more on a GPU than padded ones; None where they do not.

    implementation: of its attention; None for transformers' choice. planned: on a GPU that is not here, whose
    flash-attention is taken to be right.
    """
    if (implementation or "").startswith("flash"):
        return None
    text = config.get_text_config()
    suits = suits_flash(text, dtype) if planned else by_flash(text, torch.device("cuda"), dtype)
    if suits and implementation in (None, "sdpa", APART):
        return None
    return f"{config.model_type} would compare every token of a packed row with every other on a GPU"


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Causal attention within the borders: (1, T, heads, d). query, key, value: (1, heads, T, d)."""
    options = {"dropout_p": given.get("dropout", 0.0), "scale": given.get("scaling")}
    return attention.within_borders(query, key, value, given["cu_seq_lens_q"].diff().tolist(), **options)


def _positions(backbone: Any, inputs: Mapping[str, Any], lengths: list[int]) -> Tensor:
    """Positions (1 + A, 1, T): in the sequence's own text order, by which transformers keeps sequences apart; then the
    model's own on each axis, which it computes as for a padded batch.
    """
    known = inspect.signature(backbone.get_rope_index).parameters
    given = {name: value for name, value in inputs.items() if name in known}
    for name in ("input_ids", *TOKEN_TYPES):
        if name in given:
            given[name] = pad_sequence(list(given[name][0].split(lengths)), batch_first=True)
    text_1T = inputs["position_ids"]
    order_S = torch.arange(max(lengths), device=text_1T.device)
    shown_RS = order_S < torch.tensor(lengths, device=text_1T.device).unsqueeze(1)
    own_ARS, _ = backbone.get_rope_index(**{**given, "attention_mask": shown_RS.long()})
    return torch.cat([text_1T, own_ARS[:, shown_RS]]).unsqueeze(1)


def fault(config: Any, placeholder: Row, picture: Mapping[str, Tensor], flash: bool = False) -> str | None:
    """Why models of this configuration do not keep packed sequences apart, or cannot be shown to; None where they do.

    placeholder, picture: a blank picture's tokens, and its tensors, as the model's processor makes them (see
    `Encoder`); empty for text-only models. flash: by flash-attention.
    """
    kind = config.model_type
    if others := sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - ATTENTION):
        return f"{kind} has layers that pass on more than attention does ({', '.join(others)})"
    # Positions and token types follow from the tokens; what the tower sees has no part in it.
    sizes = {name: value for name, value in picture.items() if not vision.is_pixels(name)}
    try:
        backbone = _small(config)
        if (reason := _measured(backbone, kind, placeholder, sizes)) is not None or not flash:
            return reason
        text = roles.decoder(backbone)
        if not text._supports_attention_backend:
            return f"{kind} does not pass the borders of sequences to flash-attention"
        _register()
        text.config._attn_implementation = BY_BORDERS
        return _measured(backbone, kind, placeholder, sizes)
    except Exception as error:  # of any kind: a family's own code runs on a configuration that it did not foresee
        return f"{kind} could not be measured ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _small(config: Any) -> Any:
    """A small model without its LM head, with windows narrower than the sequences that are measured."""
    config = copy.deepcopy(config)
    text, token = config.get_text_config(), roles.picture_token(config) or 0
    text.vocab_size = max(text.vocab_size, token + 1)
    return small.made(config, window=WINDOW).base_model


@torch.no_grad()
def _measured(backbone: Any, kind: str, placeholder: Row, sizes: Mapping[str, Tensor]) -> str | None:
    """The comparison of `fault`: sequences of text, with a picture, and of a picture alone, each alone and all packed.

    sizes: the model's inputs for one picture, without the picture.
    """
    layers, ran = roles.decoder(backbone).layers, set[int]()
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.add(number))
    rows = _rows(backbone, placeholder)

    def hidden(chosen: Sequence[tuple[Row, bool]], apart: bool = True) -> Tensor:
        tensors, edges = pack([row for row, _ in chosen])
        count = sum(shown for _, shown in chosen)
        pictures = {name: torch.cat([value] * count) for name, value in sizes.items()} if count else {}
        kept = borders(edges if apart else [0, edges[-1]])
        with entering(backbone, {**tensors, **kept, **pictures}) as given:
            return backbone(**given, use_cache=False).last_hidden_state[0]

    alone_TD = torch.cat([hidden([row]) for row in rows])
    packed_TD, joint_TD = hidden(rows), hidden(rows, apart=False)
    if missing := sorted(set(range(len(layers))) - ran):
        return f"{kind} reads pictures in other ways than as tokens (layer {missing[0]} did not run without one)"
    size = alone_TD.abs().mean()
    if not (joint_TD - alone_TD).abs().max() > TOLERANCE * size:
        return f"{kind} could not be measured (sequences that meet differ too little from sequences alone)"
    # Apart, each sequence is computed as alone, unless a mask lets its tokens see more than earlier ones.
    for kept_TD in (packed_TD, hidden(rows) if attend_apart(backbone) else packed_TD):
        if not (off := float((kept_TD - alone_TD).abs().max() / size)) <= TOLERANCE:
            return f"{kind} does not keep packed sequences apart (hidden states differ by {off:.1e} of their size)"
    return None


def _rows(backbone: Any, placeholder: Row) -> list[tuple[Row, bool]]:
    """Sequences of different words, and whether each shows a picture."""
    ids = [v for n, v in backbone.config.to_dict().items() if n.endswith("token_id") and v is not None]
    special = {*placeholder["input_ids"], *itertools.chain(*(v if isinstance(v, list) else [v] for v in ids))}
    vocabulary = roles.decoder(backbone).config.vocab_size
    words = itertools.cycle([token for token in range(min(vocabulary, 500)) if token not in special])
    pictured = bool(placeholder["input_ids"])

    def row(before: int, after: int, shown: bool) -> tuple[Row, bool]:
        made: Row = {}
        for name, values in placeholder.items():
            if name not in ("attention_mask", "labels"):
                text = [next(words) if name == "input_ids" else 0 for _ in range(before + after)]
                made[name] = text[:before] + (values if shown else []) + text[before:]
        return made, shown

    rows = [row(3, 4, False), row(2, 5, pictured), row(4, 3, pictured), row(5, 1, False)]
    return [*rows, row(0, 0, True)] if pictured else rows


def _register() -> None:
    from transformers import AttentionInterface

    def by_borders(
        _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        """Attention within the borders; windows and sinks are left out."""
        return _one_by_one(query, key, value, given), None

    AttentionInterface.register(BY_BORDERS, by_borders)
