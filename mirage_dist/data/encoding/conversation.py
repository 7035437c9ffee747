"""A conversation as text: a sample in a model's chat template, divided into prompts and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols

from mirage_dist.data.encoding import templates
from mirage_dist.data.encoding.control import Control
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

Turns = Sequence[tuple[str, str]]  # (question, answer) pairs, oldest first
PROBE = "⟦7391⟧"  # stands for an answer where a template's own text around answers is looked for
# Variables of a template that are no options of it, beside the tokenizer's special tokens.
GIVEN = {"messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now"}
GIVEN |= {"namespace", "dict", "range"}


def template_of(processor: Any) -> str | None:
    """The chat template of a processor, or of its tokenizer, where older directories keep it; None without one."""
    template = getattr(processor, "chat_template", None) or getattr(tokenizer_of(processor), "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer. For a text-only model `AutoProcessor` returns the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


class Conversation:
    """One model's chat template, from any Hugging Face processor or a text-only model's tokenizer.

    The generation prompt is what the model sees, and the answer follows it. Some templates begin the turn of an answer
    in another way (LLaVA-OneVision by another white space, Qwen3 by an empty block of thoughts before the last answer);
    that beginning is left out.

    options: variables of the template, such as `enable_thinking` of Qwen3's. picture_token: the id at whose places the
    model puts a picture's features.

    control: the model's control tokens. Where a sample's texts or the system prompt spell one, the rendered text has a
    stand-in (see `encoding.control`).

    Raises ConfigError for an option that the template does not have, for a system prompt that it leaves out; and,
    naming the sample, when the template rewrites earlier turns or the answer.
    """

    def __init__(
        self,
        processor: Any,
        system_prompt: str | None,
        options: Mapping[str, Any] | None = None,
        picture_token: int | None = None,
    ) -> None:
        self.processor, self.tokenizer, self.system_prompt = processor, tokenizer_of(processor), None
        self.text_only = self.tokenizer is processor
        self.options = dict(options or {})
        self.template = template_of(processor)
        if self.options and (unknown := set(self.options) - (known := options_of(self.template or "", self.tokenizer))):
            raise ConfigError(
                f"template_options: the model's chat template has no option {', '.join(sorted(unknown))}; it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        self.marks = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.control = Control(self.tokenizer, processor, self._example(), picture_token)
        if system_prompt is not None:
            self.system_prompt = self.control.shielded(system_prompt)
            if (written := self._example()) and self.system_prompt.strip() not in written:
                raise ConfigError(
                    "system_prompt: the model's chat template leaves a system prompt out, so the text would reach no "
                    "prompt; take it out, or choose a model whose template writes one"
                )

    def _example(self) -> str:
        """What the template writes around two questions and the answer between them, or around one question."""
        for past in ([(PROBE, PROBE)], []):
            try:
                return self.text(False, past, PROBE, generates=False)
            except templates.TooMuch as error:
                raise ConfigError(f"the model's chat template exceeds a bound: {error}") from error
            except (TemplateError, ValueError):  # it takes no second turn, or none without a picture
                continue
        return ""

    def pieces(self, sample: Sample, answered: bool) -> list[str]:
        """The conversation as a prompt, an answer through its end token, a prompt, …

        answered: end with the sample's answer; else with its prompt, followed by the beginning of the answer if the
        sample has one (`Sample.begun`).
        """
        try:
            return self._pieces(self._shielded(sample), answered)
        except (TemplateError, ValueError) as error:
            raise ConfigError(f"{called(sample)}: the chat template does not take it: {error}") from error

    def _shielded(self, sample: Sample) -> Sample:
        """The sample with stand-ins for the control tokens that its texts spell."""
        texts = {name: self.control.shielded(getattr(sample, name)) for name in ("question", "answer", "begun")}
        history = tuple((self.control.shielded(q), self.control.shielded(a)) for q, a in sample.history)
        return replace(sample, history=history, **texts)

    def _pieces(self, sample: Sample, answered: bool) -> list[str]:
        turns = [*sample.history, (sample.question, sample.answer)]
        pieces, whole, rest = [], "", ""
        for number, (question, answer) in enumerate(turns):
            prompt = self._text(sample, turns[:number], question)
            # Text that the template adds after an answer's end token belongs to the next prompt.
            follows = prompt.startswith(whole)
            pieces.append(rest + prompt[len(whole) :] if follows else self._next_prompt(sample, turns[: number + 1]))
            if answered or number + 1 < len(turns):
                whole = self._text(sample, turns[: number + 1], None)
                reply = self._reply(sample, turns[:number], (question, answer), prompt, whole)
                reply, rest = self._split_reply(reply, answer, sample)
                pieces.append(reply)
        if sample.begun and not answered:
            pieces.append(self._begun(sample, turns, prompt))
        return pieces

    def _reply(self, sample: Sample, past: Turns, turn: tuple[str, str], prompt: str, whole: str) -> str:
        """The template's text from the answer on, which follows the generation prompt.

        prompt, whole: `text` before and after the answer.
        """
        question, answer = turn
        after = whole[len(prompt) :] if whole.startswith(prompt) else ""
        if answer.strip() and after.lstrip().startswith(answer.strip()):
            return after

        def write(reply: str) -> str:
            return self._text(sample, [*past, (question, reply)], None)

        place = self._place(sample, past, turn, write)
        before = whole[len(prompt) : place] if whole.startswith(prompt) else whole[:place]
        if before.strip():
            # The prompt's white space stands for the template's own; where it has none, the model writes it.
            before = "" if prompt[-1:].isspace() else before[len(before.rstrip()) :]
        return before + whole[place:]

    def _next_prompt(self, sample: Sample, turns: Turns) -> str:
        """The last prompt after the answer before it, which the template writes here in another way than as the last.

        Its end token belongs to that answer.
        """
        *past, (question, answer), (last, _) = turns

        def write(reply: str) -> str:
            return self._text(sample, [*past, (question, reply)], last)

        place = self._place(sample, past, (question, answer), write)
        return self._split_reply(write(answer)[place:], answer, sample)[1]

    def _place(self, sample: Sample, past: Turns, turn: tuple[str, str], write: Callable[[str], str]) -> int:
        """Where the answer begins in the conversation that `write` makes of it: where any other answer would.

        Only the text that introduces the answer may differ from the generation prompt.
        """
        question, answer = turn
        start, whole, other = self._text(sample, past, question, generates=False), write(answer), write(PROBE)
        if not all(text.startswith(start) for text in (whole, other, self._text(sample, past, question))):
            raise ConfigError(
                f"{called(sample)}: the chat template rewrites earlier turns when a turn is added; labels cannot be "
                "placed. Use a template in which a prompt is a prefix of its conversation"
            )
        place = other.find(PROBE, len(start))
        if place < 0 or whole[:place] != other[:place]:
            raise ConfigError(f"{called(sample)}: the chat template rewrites the answer; labels cannot be placed")
        return place

    def _begun(self, sample: Sample, turns: Turns, prompt: str) -> str:
        """The beginning of the answer as the template writes it, without an end token."""
        begun = sample.begun.rstrip()  # the next word brings its own space
        turn = sample.question, begun
        whole = self._text(sample, [*turns[:-1], turn], None)
        reply = self._reply(sample, turns[:-1], turn, prompt, whole)
        if begun not in reply:
            raise ConfigError(f"{called(sample)}: the chat template rewrites the answer; it cannot be begun")
        return reply[: reply.index(begun) + len(begun)]

    def _text(self, sample: Sample, past: Turns, question: str | None, generates: bool = True) -> str:
        """`text` of a sample's turns so far."""
        return self.text(sample.image is not None, past, question, generates, sample.shown)

    def text(self, picture: bool, past: Turns, question: str | None, generates: bool = True, shown: int = 0) -> str:
        """The conversation so far as text; with a question, it ends where the answer begins.

        picture: whether a question is about a picture. past: earlier (question, answer) turns. generates: whether a
        question is followed by the generation prompt. shown: which question is about the picture, from 0; the turns so
        far may end before it. Raises ConfigError for a picture in a text-only model's conversation.
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
            for message in [m for m in messages if m["role"] == "user"][shown : shown + 1]:
                message["content"].insert(0, {"type": "image"})
        prompted = question is not None and generates
        options = {"add_generation_prompt": prompted, "tokenize": False, **self.options}
        if self.template is None:
            return self.processor.apply_chat_template(messages, **options)
        # By the tokenizer, since some processors' own method also prepares videos (SmolVLM's).
        render = self.tokenizer.apply_chat_template
        return templates.bounded(lambda: render(messages, chat_template=self.template, **options))

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


class Assessed(Conversation):
    """Conversations as safety classifiers take them: the whole of it, with the sample's answer, is the prompt.

    The template may write anything around the turns (Llama Guard's writes its instructions, and asks about the last
    one), since nothing in them is labelled.
    """

    def _example(self) -> str:
        self.options["add_generation_prompt"] = True  # after the answer the classifier speaks
        return super()._example()

    def _pieces(self, sample: Sample, answered: bool) -> list[str]:
        return [self._text(sample, [*sample.history, (sample.question, sample.answer)], None)]


class _Generation(Extension):
    """transformers' tag around what a model generates, which marks nothing here."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def options_of(template: str, tokenizer: Any) -> set[str]:
    """The variables of a chat template that a recipe may set. Raises ConfigError when the template cannot be read."""
    try:
        tree = Environment(extensions=[_Generation, loopcontrols]).parse(template)
    except (TemplateError, RecursionError) as error:
        raise ConfigError(f"the chat template cannot be read: {error}") from error
    return meta.find_undeclared_variables(tree) - GIVEN - set(tokenizer.special_tokens_map)


def called(sample: Sample) -> str:
    """A sample's file and id, for error messages."""
    return f"{sample.source}: sample {sample.id!r}"
