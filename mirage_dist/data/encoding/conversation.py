"""A conversation as text: what a model's chat template makes of a sample, cut into prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; of a text-only model `AutoProcessor` gives the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


class Conversation:
    """One model's chat template, of any Hugging Face processor, or of a text-only model's tokenizer.

    Raises ConfigError by sample when the template does not let a prompt be a prefix of its conversation, or rewrites
    the answer.
    """

    def __init__(self, processor: Any, system_prompt: str | None) -> None:
        self.processor, self.tokenizer, self.system_prompt = processor, tokenizer_of(processor), system_prompt
        self.text_only = self.tokenizer is processor
        self.marks = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def pieces(self, sample: Sample, answered: bool) -> list[str]:
        """The conversation as a prompt, an answer through its end token, a prompt, …; the last one by `answered`.

        Behind a prompt whose answer is begun stands a piece of that.
        """
        turns = [*sample.history, (sample.question, sample.answer)]
        pieces, told, rest = [], "", ""
        for number, (question, answer) in enumerate(turns):
            asked = self.text(sample.image is not None, turns[:number], question)
            # What the template puts behind an answer's end token belongs to the next prompt.
            pieces.append(rest + _suffix(told, asked, sample))
            if answered or number + 1 < len(turns):
                told = self.text(sample.image is not None, turns[: number + 1], None)
                spoken, rest = self._spoken(_suffix(asked, told, sample), answer, sample)
                pieces.append(spoken)
        if sample.begun and not answered:
            pieces.append(self._begun(sample, turns, asked))
        return pieces

    def _begun(self, sample: Sample, turns: Sequence[tuple[str, str]], asked: str) -> str:
        """What the template writes of an answer that begins so and is not at its end."""
        begun = sample.begun.rstrip()  # the next word brings its own space
        told = self.text(sample.image is not None, [*turns[:-1], (sample.question, begun)], None)
        reply = _suffix(asked, told, sample)
        if begun not in reply:
            raise ConfigError(f"{called(sample)}: the chat template rewrites the answer; it cannot be begun")
        return reply[: reply.index(begun) + len(begun)]

    def text(self, picture: bool, past: Sequence[tuple[str, str]], question: str | None) -> str:
        """The conversation so far as text; with a question, it ends where the answer begins."""
        messages: list[Mapping[str, Any]] = []
        if self.system_prompt is not None:
            messages.append(self._message("system", self.system_prompt))
        for asked, answered in past:
            messages += [self._message("user", asked), self._message("assistant", answered)]
        if question is not None:
            messages.append(self._message("user", question))
        if picture:
            if self.text_only:
                raise ConfigError("a text-only model is asked about a picture; take one that sees, or records without")
            first = next(m for m in messages if m["role"] == "user")
            first["content"].insert(0, {"type": "image"})
        return self.processor.apply_chat_template(messages, add_generation_prompt=question is not None, tokenize=False)

    def _message(self, role: str, text: str) -> dict[str, Any]:
        """Templates of text-only models know no parts."""
        return {"role": role, "content": text if self.text_only else [{"type": "text", "text": text}]}

    def _spoken(self, reply: str, answer: str, sample: Sample) -> tuple[str, str]:
        """What the model should say, through its end token, and what the template writes behind that.

        The end token is the template's own where it writes one after an answer, else the tokenizer's.
        """
        said = answer if answer in reply else answer.strip()
        if said not in reply:
            raise ConfigError(f"{called(sample)}: the chat template rewrites the answer; labels cannot be placed")
        place = reply.index(said) + len(said)
        ends = [reply.index(mark, place) + len(mark) for mark in self.marks if mark in reply[place:]]
        if not ends:
            return reply[:place] + self.tokenizer.eos_token, reply[place:]
        return reply[: min(ends)], reply[min(ends) :]


def _suffix(start: str, whole: str, sample: Sample) -> str:
    if not whole.startswith(start):
        raise ConfigError(
            f"{called(sample)}: the chat template rewrites what came before when a turn is added; labels cannot be "
            "placed. Use a template in which a prompt is a prefix of its conversation"
        )
    return whole[len(start) :]


def called(sample: Sample) -> str:
    """How messages call a sample."""
    return f"{sample.source}: sample {sample.id!r}"
