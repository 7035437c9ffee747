"""A chat model's answer without the reasoning that it wrote before it."""

from __future__ import annotations

import re

_NAMES = "think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad"
# <think>, <seed:think>, <|begin_of_thought|>, [THINK], ◁think▷ and the tags that close them.
_TAG = re.compile(
    rf"<(?P<close>/)?(?:\w+:)?(?:{_NAMES})>"
    rf"|<\|(?P<close_piped>end_of_|/)?(?:begin_of_)?(?:{_NAMES})\|>"
    r"|\[(?P<close_bracket>/)?THINK\]"
    r"|◁(?P<close_triangle>/)?think▷",
    re.IGNORECASE,
)
# Messages in channels: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>.
_CHANNEL = "<|channel|>"
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*<\|message\|>")
_END = re.compile(r"<\|(?:end|return|start|call)\|>")
# The same after a decoder that leaves special tokens out: `analysis…assistantfinal…`.
_BARE = re.compile(r"analysis(?=[A-Z\"'(])(?:.*assistantfinal(?P<final>.*))?.*", re.DOTALL)
_WRAPPED = re.compile(r"\s*<(answer|response|output)>(?P<inner>.*?)(?:</\1>\s*)?", re.DOTALL | re.IGNORECASE)


def answer(text: str) -> str:
    """The text without its reasoning; empty when the reasoning was not closed, so that no answer followed.

    A closing tag without an opening one counts as well: some chat templates put the opening tag into the prompt. An
    opening tag counts at the start of a line only; elsewhere it is a word of the answer. Text without reasoning is
    returned as it is.
    """
    if _CHANNEL in text:
        *_, last = _FINAL.split(text)
        return _END.split(last)[0].strip() if _FINAL.search(text) else ""
    if bare := _BARE.fullmatch(text):
        return (bare["final"] or "").strip()
    pieces, place, inside, changed = [], 0, False, False
    seen, blank = 0, True  # the end of the last tag, and whether nothing else stands before it in its line
    for tag in _TAG.finditer(text):
        *earlier, line = text[seen : tag.start()].rsplit("\n", 1)
        blank, seen = (blank or bool(earlier)) and not line.strip(), tag.end()
        if any(tag.groupdict().values()):
            if not inside:
                pieces.clear()  # all of it was reasoning
            inside, place, changed, blank = False, tag.end(), True, True
        elif blank and not inside:
            pieces.append(text[place : tag.start()])
            inside, changed = True, True
        else:
            blank = False
    if not inside:
        pieces.append(text[place:])
    kept = "".join(pieces).strip() if changed else text
    wrapped = _WRAPPED.fullmatch(kept)
    return wrapped["inner"].strip() if wrapped else kept
