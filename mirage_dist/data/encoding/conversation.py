"""A conversation as text: a sample in a model's chat template, divided into prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer. For a text-only model `AutoProcessor` returns the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


class Conversation:
    """One model's chat template, from any Hugging Face processor or a text-only model's tokenizer.

    Raises ConfigError naming the sample when a prompt in the template is no prefix of its conversation, or when the
    template rewrites the answer.
    """

    def __init__(self, processor: Any, system_prompt: str | None) -> None:
        self.processor, self.tokenizer, self.system_prompt = processor, tokenizer_of(processor), system_prompt
        self.text_only = self.tokenizer is processor
        self.marks = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def pieces(self, sample: Sample, answered: bool) -> list[str]:
        """The conversation as a prompt, an answer through its end token, a prompt, …

        answered: end with the sample's answer; else with its prompt, followed by the beginning of the answer if the
        sample has one (`Sample.begun`).
        """
        turns = [*sample.history, (sample.question, sample.answer)]
        pieces, whole, rest = [], "", ""
        for number, (question, answer) in enumerate(turns):
            prompt = self.text(sample.image is not None, turns[:number], question)
            # Text that the template adds after an answer's end token belongs to the next prompt.
            pieces.append(rest + _suffix(whole, prompt, sample))
            if answered or number + 1 < len(turns):
                whole = self.text(sample.image is not None, turns[: number + 1], None)
                reply, rest = self._split_reply(_suffix(prompt, whole, sample), answer, sample)
                pieces.append(reply)
        if sample.begun and not answered:
            pieces.append(self._begun(sample, turns, prompt))
        return pieces

    def _begun(self, sample: Sample, turns: Sequence[tuple[str, str]], prompt: str) -> str:
        """The beginning of the answer as the template writes it, without an end token."""
        begun = sample.begun.rstrip()  # the next word brings its own space
        whole = self.text(sample.image is not None, [*turns[:-1], (sample.question, begun)], None)
        reply = _suffix(prompt, whole, sample)
        if begun not in reply:
            raise ConfigError(f"{called(sample)}: the chat template rewrites the answer; it cannot be begun")
        return reply[: reply.index(begun) + len(begun)]

    def text(self, picture: bool, past: Sequence[tuple[str, str]], question: str | None) -> str:
        """The conversation so far as text; with a question, it ends where the answer begins.

        picture: whether the first question is about a picture. past: earlier (question, answer) turns. Raises
        ConfigError for a picture in a text-only model's conversation.
        """
        messages: list[Mapping[str, Any]] = []
        if self.system_prompt is not None:
            messages.append(self._message("system", self.system_prompt))
        for past_question, answer in past:
            messages += [self._message("user", past_question), self._message("assistant", answer)]
        if question is not None:
            messages.append(self._message("user", question))
        if picture:
            if self.text_only:
                raise ConfigError(
                    "a text-only model cannot answer questions about pictures; use a vision-language model, or records "
                    "without pictures"
                )
            first = next(m for m in messages if m["role"] == "user")
            first["content"].insert(0, {"type": "image"})
        return self.processor.apply_chat_template(messages, add_generation_prompt=question is not None, tokenize=False)

    def _message(self, role: str, text: str) -> dict[str, Any]:
        """A chat message; templates of text-only models take its content as plain text, others as a list of parts."""
        return {"role": role, "content": text if self.text_only else [{"type": "text", "text": text}]}

    def _split_reply(self, reply: str, answer: str, sample: Sample) -> tuple[str, str]:
        """The reply that the model should generate, through its end token, and the template's text after it.

        The end token is the template's own if it writes one after an answer, else the tokenizer's.
        """
        text = answer if answer in reply else answer.strip()
        if text not in reply:
            raise ConfigError(f"{called(sample)}: the chat template rewrites the answer; labels cannot be placed")
        place = reply.index(text) + len(text)
        ends = [reply.index(mark, place) + len(mark) for mark in self.marks if mark in reply[place:]]
        if not ends:
            return reply[:place] + self.tokenizer.eos_token, reply[place:]
        return reply[: min(ends)], reply[min(ends) :]


def _suffix(start: str, whole: str, sample: Sample) -> str:
    if not whole.startswith(start):
        raise ConfigError(
            f"{called(sample)}: the chat template rewrites earlier turns when a turn is added; labels cannot be "
            "placed. Use a template in which a prompt is a prefix of its conversation"
        )
    return whole[len(start) :]


def called(sample: Sample) -> str:
    """A sample's file and id, for error messages."""
    return f"{sample.source}: sample {sample.id!r}"
