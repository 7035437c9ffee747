"""Configurations of narrow models of the same classes: what is computed stays, its size does not.

Widths of heads stay, since rotary sections divide them, and the vocabulary, since token ids have meanings. A width that
follows another one, such as that of a tower's output, is recognised by its value. This cannot be right for every
family: where the narrow model cannot be made or run, a caller tries the whole widths.
"""

from __future__ import annotations

import copy
from typing import Any

MLP = 64
# What configurations call the number of heads.
COUNTS = ("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads")


def narrowed(config: Any, window: int | None = None) -> Any:
    """A copy with one head in the decoder and in every tower, and narrow MLPs.

    window: the width of sliding windows and attention chunks, None for the configuration's own.
    """
    small = copy.deepcopy(config)
    narrow_mlps(small)
    text = small.get_text_config()
    changes = {id(part): _narrow(part) for part in parts(small)}
    decoder = changes[id(text)]
    others = [change for part in parts(small) if part is not text and (change := changes[id(part)])]
    for part in [small, *parts(small)]:
        own = changes.get(id(part))
        for name, value in list(vars(part).items()):
            if not _is_width(name) or type(value) is not int or (own and name == own[0]):
                continue
            for change in (decoder, own, *others):
                if change and (width := _following(value, change, within=change is own)) is not None:
                    setattr(part, name, width)
                    break
    for name, value in list(vars(text).items()):
        if name in ("sliding_window", "attention_chunk_size") and value and window:
            setattr(text, name, window)
    return small


def narrow_mlps(config: Any) -> None:
    """Make the MLPs of the decoder and the towers narrow, in place; hidden states keep their width."""
    for part in parts(config):
        for name, value in list(vars(part).items()):
            if name.endswith("intermediate_size") and type(value) is int:
                setattr(part, name, min(value, MLP))


def parts(config: Any) -> list[Any]:
    """The configurations of the decoder and of every other part, each once."""
    inner = [getattr(config, name, None) for name in config.sub_configs or {}]
    by_id = {id(part): part for part in (config.get_text_config(), *inner) if hasattr(part, "to_dict")}
    return list(by_id.values())


def _narrow(part: Any) -> tuple[str, int, int] | None:
    """Narrow one part in place; the name of its width, which it had and which it has. None where it stays as it is."""
    heads_name = next((name for name in COUNTS if type(getattr(part, name, None)) is int), None)
    # Where both exist, the second one is the width of the output.
    name = "embed_dim" if "embed_dim" in vars(part) else "hidden_size"
    width = getattr(part, name, None)
    if heads_name is None or type(width) is not int:
        return None
    head = getattr(part, "head_dim", None) or width // getattr(part, heads_name)
    if head >= width:
        return None
    if type(getattr(part, "num_key_value_heads", None)) is int:
        part.num_key_value_heads = 1
    setattr(part, heads_name, 1)
    setattr(part, name, head)
    return name, width, head


def _is_width(name: str) -> bool:
    ends = name in ("dim", "width") or name.endswith(("_dim", "_width"))
    return "head" not in name and ("hidden_size" in name or ends)


def _following(value: int, change: tuple[str, int, int], within: bool) -> int | None:
    """What a width becomes that was another one, or within the same part a multiple of it; None for any other."""
    _, before, after = change
    return value // before * after if value == before or (within and value % before == 0) else None
