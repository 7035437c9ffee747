"""From samples to tensors: chat template, label mask, response index, padding, placeholder picture.

The same code makes training batches and generation prompts, so both see one template and one picture
transform. Prompt and answer are tokenised apart: training sees exactly the tokens that generation continues.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mirage_dist.config import ConfigError
from mirage_dist.data.sources import Sample

IGNORE = -100


class TooLong(ConfigError):
    """A sample that does not fit into `max_length`."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rows, all streams in one tensor, right-padded.

    inputs: the model's keyword arguments (input_ids (B, S), attention_mask, pixel_values …).
    labels_BS: token ids on answers and their end tokens, -100 elsewhere. index_N: flat positions b·S + t of
    the hidden rows that predict a label. text_BS: 1 on positions of question and answer, without picture,
    template marks excluded only where they are padding. cut: rows whose answer was truncated.
    """

    inputs: dict[str, Tensor]
    labels_BS: Tensor
    index_N: Tensor
    text_BS: Tensor
    cut: int


class Encoder:
    """Chat template and processor of one model, for any Hugging Face image-text-to-text processor.

    Raises ConfigError when the template does not let a prompt be a prefix of its conversation, or there is no end
    token.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int = 2048,
        on_long: Literal["error", "truncate"] = "error",
        image_aspect: Literal["pad", "processor"] = "pad",
        system_prompt: str | None = None,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length, self.on_long = max_length, on_long
        self.image_aspect, self.system_prompt = image_aspect, system_prompt
        if self.tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no end token (eos_token); answers would never end")
        self.pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        )
        self.image_token = getattr(processor, "image_token_id", None)

    # -------------------------------------------------------------------------------------- generation

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Keyword arguments of `generate` for these questions, left-padded. Raises TooLong."""
        rows, pictures = self._prompt_rows(samples)
        for sample, row in zip(samples, rows, strict=True):
            if len(row) > self.max_length:
                raise TooLong(f"{_name(sample)}: the prompt has {len(row)} tokens, max_length is {self.max_length}")
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": self._hide_placeholders(samples, ids, mask), **pictures}

    # ---------------------------------------------------------------------------------------- training

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """One training batch. Raises TooLong for a row over max_length unless `on_long` is truncate."""
        prompts, pictures = self._prompt_rows(samples, first_turn=True)
        rows, labels, cut = [], [], 0
        for sample, prompt in zip(samples, prompts, strict=True):
            ids, label = self._conversation(sample, prompt)
            if len(ids) > self.max_length:
                ids, label, cut = *self._truncate(sample, ids, label), cut + 1
            rows.append(ids)
            labels.append(label)
        width = max(map(len, rows))
        ids_BS = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        labels_BS = torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels])
        filled_BS = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        mask_BS = self._hide_placeholders(samples, ids_BS, filled_BS)
        predicts_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
        predicts_BS[:, :-1] = labels_BS[:, 1:] != IGNORE
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, **pictures}
        if any(sample.image is None for sample in samples):
            # A hidden placeholder must not move the words behind it: positions count what is attended to.
            inputs["position_ids"] = (mask_BS.cumsum(1) - 1).clamp(min=0)
        text_BS = mask_BS if self.image_token is None else mask_BS * (ids_BS != self.image_token)
        return Batch(inputs, labels_BS, predicts_BS.flatten().nonzero().squeeze(1), text_BS, cut)

    def _truncate(self, sample: Sample, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Cut the last answer's end; never the picture or a question."""
        last_question = max(i for i, label in enumerate(labels) if label == IGNORE)
        if self.on_long != "truncate" or last_question + 1 >= self.max_length:
            raise TooLong(
                f"{_name(sample)}: {len(ids)} tokens, {last_question + 1} of them before the answer; "
                f"data.max_length is {self.max_length} (data.on_long={self.on_long})"
            )
        return ids[: self.max_length], labels[: self.max_length]

    def _conversation(self, sample: Sample, prompt: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a whole conversation whose first prompt is already tokenised."""
        turns = [*sample.history, (sample.question, sample.answer)]
        ids, labels = list(prompt), [IGNORE] * len(prompt)
        for number, (_, answer) in enumerate(turns):
            if number:
                told = self._template(sample, turns[:number], None)
                between = _suffix(told, self._template(sample, turns[:number], turns[number][0]), sample)
                # What the template puts after an answer's end token belongs to the next prompt.
                ids += self._ids(_after(told, turns[number - 1][1], self.tokenizer.eos_token) + between)
                labels += [IGNORE] * (len(ids) - len(labels))
            asked = self._template(sample, turns[:number], turns[number][0])
            whole = _suffix(asked, self._template(sample, turns[: number + 1], None), sample)
            spoken = self._ids(_through_end(whole, answer, self._end_token(whole, answer)))
            ids += spoken
            labels += spoken
        return ids, labels

    # ------------------------------------------------------------------------------------------- parts

    def _prompt_rows(self, samples: Sequence[Sample], first_turn: bool = False) -> tuple[list[list[int]], dict]:
        """Unpadded prompt ids with picture tokens expanded, and the picture tensors.

        Where one row has a picture, the others get a placeholder: the same modules run for every batch.
        """
        texts, images = [], []
        for sample in samples:
            turns = [*sample.history, (sample.question, sample.answer)]
            past, asked = ([], turns[0][0]) if first_turn else (turns[:-1], turns[-1][0])
            texts.append(self._template(sample, past, asked))
            images.append(self._picture(sample))
        # The processor pads on the side that the tokenizer names; padding is taken off by the mask here.
        encoded = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        known = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        pictures = {name: value for name, value in encoded.items() if name not in known}
        pairs = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in pairs], pictures

    def _template(self, sample: Sample, past: Sequence[tuple[str, str]], question: str | None) -> str:
        """The conversation so far as text; with a question, it ends where the answer begins."""
        messages: list[Mapping[str, Any]] = []
        if self.system_prompt is not None:
            messages.append(_message("system", self.system_prompt))
        for asked, answered in past:
            messages += [_message("user", asked), _message("assistant", answered)]
        if question is not None:
            messages.append(_message("user", question))
        first = next(m for m in messages if m["role"] == "user")
        first["content"].insert(0, {"type": "image"})
        return self.processor.apply_chat_template(messages, add_generation_prompt=question is not None)

    def _picture(self, sample: Sample) -> Image.Image:
        if sample.image is None:
            return Image.new("RGB", (32, 32))
        with Image.open(sample.image) as opened:
            image = opened.convert("RGB")
        if self.image_aspect == "processor" or image.width == image.height:
            return image
        side = max(image.size)
        mean = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        red, green, blue = (int(255 * channel) for channel in mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _hide_placeholders(self, samples: Sequence[Sample], ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Mask the picture tokens of rows that have no picture."""
        without = torch.tensor([[sample.image is None] for sample in samples])
        return mask_BS if self.image_token is None else mask_BS * ~(without & (ids_BS == self.image_token))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _end_token(self, whole: str, answer: str) -> str:
        """The template's own end token where it writes one after the answer, else the tokenizer's."""
        rest = whole[whole.index(answer) + len(answer) :] if answer in whole else ""
        found = [token for token in self.tokenizer.all_special_tokens if token and token in rest]
        return min(found, key=rest.index) if found else self.tokenizer.eos_token


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _suffix(start: str, whole: str, sample: Sample) -> str:
    if not whole.startswith(start):
        raise ConfigError(
            f"{_name(sample)}: the chat template rewrites what came before when a turn is added; labels cannot be "
            "placed. Use a template in which a prompt is a prefix of its conversation"
        )
    return whole[len(start) :]


def _through_end(whole: str, answer: str, end: str) -> str:
    """The answer as the template writes it, up to and with its end token."""
    place = whole.index(answer) + len(answer) if answer in whole else len(whole)
    return whole[: whole.index(end, place) + len(end)] if end in whole[place:] else whole[:place] + end


def _after(told: str, answer: str, end: str) -> str:
    """What the template writes behind the end of the conversation's last answer."""
    rest = told[told.rindex(answer) + len(answer) :] if answer in told else ""
    return rest.partition(end)[2] if end in rest else rest


def _name(sample: Sample) -> str:
    return f"{sample.source}: sample {sample.id!r}"
