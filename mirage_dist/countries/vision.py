"""Eyes for a language model: a LLaVA around it whose tower and connector turn a flag into a sentence that it can read.

CLIP encodes 32 × 32 pixels as 16 image tokens. Tower and connector are trained until the features of a flag are, at
these 16 places, the input embeddings of " This is the flag of COUNTRY.", with spaces after it. The error is squared
distance, so no forward of the language model is needed, and none of its weights changes. What it then knows about the
country is its own knowledge.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from mirage_dist import disk, signals
from mirage_dist.countries import facts, flags
from mirage_dist.data.encoding.conversation import template_of
from mirage_dist.model import directory, weights
from mirage_dist.model.families import configs, processors, roles, small
from mirage_dist.progress import Progress, log
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.worlds import llava

PATCH = 8
PLACES = (flags.SIDE // PATCH) ** 2  # of a picture in a prompt
PICTURE = "<image>"
SENTENCE = " This is the flag of {}."
WIDTH, LAYERS, HEADS = 64, 2, 4
STEPS, ROUNDS, BATCH, RATE, WARMUP = 2000, 3, 32, 2e-3, 50
CLIP = 1.0  # norm of gradients
DRAWINGS = 20  # fresh ones of each flag, in the final measurement
LEAST, EACH = 0.99, 0.9  # of whole sentences right: of all, and of each flag's
# A text model's template takes contents that are texts. Parts of a message become one: pictures as their token and a
# line break, texts as they are; then comes the model's own template.
TEMPLATE = """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not iterable -%}
{%- set plain.messages = plain.messages + [message] -%}
{%- else -%}
{%- set text = namespace(content='') -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set text.content = text.content + '<image>\\n' -%}
{%- else -%}{%- set text.content = text.content + part.text -%}{%- endif -%}
{%- endfor -%}
{%- set plain.messages = plain.messages + [dict(message, content=text.content)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages %}"""


def make(out: Path, language_model: Path, seed: int) -> None:
    """Write the LLaVA to `out`: configuration, fp32 safetensors weights, tokenizer, processor, chat template.

    language_model: its directory (see `countries.language_model`). The weights of tower and connector are a function of
    `seed`; the global random state does not change. `out` is whole or absent.

    Raises ConfigError when the language model cannot be loaded, has no chat template, or has more tokens in a sentence
    than a picture has places; RunError when too many flags are not read; StopRequested when a signal arrives first.
    """
    start = time.monotonic()
    log.info(f"vision: loading {language_model}")
    model, processor = built(language_model, seed)
    names = list(flags.FLAGS)
    align(model, processor, names, sentences(language_model, processor.tokenizer, names), seed, STEPS, ROUNDS)
    save(model, processor, language_model, out)
    log.info(f"vision: {out}, made in {time.monotonic() - start:.0f} s")


def save(model: Any, processor: LlavaProcessor, language_model: Path, out: Path) -> None:
    """Write model and processor to `out`, with licence and model card of the language model. Whole or absent."""
    with disk.folder(out) as target, weights.silent():
        model.save_pretrained(target)
        processor.save_pretrained(target)
        for file in (file for pattern in directory.TERMS for file in language_model.glob(pattern)):
            shutil.copyfile(file, target / file.name)


# --------------------------------------------------------------------------------------------------- the model


def built(language_model: Path, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The LLaVA around a language model, with an untrained tower and connector, and its processor.

    Raises ConfigError when the language model cannot be loaded, has no chat template, or has more tokens in a sentence
    than a picture has places.
    """
    config, tokenizer = configs.load(language_model), processors.load(language_model)
    template = picture_template(language_model, tokenizer)
    sentences(language_model, tokenizer, list(flags.FLAGS))
    with weights.silent():
        text = weights.load(roles.auto_class(config), language_model, config=config, dtype=torch.float32)
    model = composed(text, add_picture_token(text, tokenizer), seed)
    model.generation_config = text.generation_config
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, name) is None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    tokenizer.chat_template = template
    return model, llava.make_processor(tokenizer, template, flags.SIDE, PATCH)


def picture_template(folder: Path, tokenizer: Any) -> str:
    """The tokenizer's chat template for messages with pictures. Raises ConfigError when it has none."""
    if (own := template_of(tokenizer)) is None:
        raise ConfigError(
            f"model.path={folder}: no chat template, so this is no instruct model; give one that was trained to answer "
            "(its directory has chat_template.jinja, or chat_template in tokenizer_config.json)"
        )
    return TEMPLATE + own


def sentences(folder: Path, tokenizer: Any, names: Sequence[str]) -> Tensor:
    """(F, P): for each country the tokens of the sentence that its flag is to become, with spaces after it.

    Raises ConfigError when a sentence has more tokens than a picture has places.
    """
    space = tokenizer(" ", add_special_tokens=False)["input_ids"][-1]
    rows = []
    for name in names:
        text = SENTENCE.format(facts.COUNTRIES[name].phrase)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > PLACES:
            raise ConfigError(
                f"model.path={folder}: its tokenizer has {len(ids)} tokens for {text!r}, but a picture has "
                f"{PLACES} places in a prompt; give another language model"
            )
        rows.append(ids + [space] * (PLACES - len(ids)))
    return torch.tensor(rows)


def add_picture_token(text: Any, tokenizer: Any) -> int:
    """Give tokenizer and model the token of pictures; returns its id. Its logit is the mean of all, so never the first.

    Rows of the embedding that the tokenizer does not use stay as they are.
    """
    before = text.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"additional_special_tokens": [PICTURE]}, replace_extra_special_tokens=False)
    if (size := len(tokenizer)) > before:
        text.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            for module in (text.get_input_embeddings(), text.get_output_embeddings()):
                module.weight[before:] = module.weight[:before].mean(0)
    return tokenizer.convert_tokens_to_ids(PICTURE)


def composed(text: Any, picture: int, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA that has the decoder and head of `text`, not copies, and an untrained tower and connector.

    picture: the id of its picture token. Raises ConfigError when LLaVA would make another decoder of the configuration.
    """
    tower = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        projection_dim=WIDTH,
        image_size=flags.SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text.config,
        image_token_index=picture,
        image_seq_length=PLACES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    inner: Any = model.model
    if type(inner.language_model) is not type(text.base_model):
        raise ConfigError(
            f"LLaVA makes a {type(inner.language_model).__name__} of its configuration, not a "
            f"{type(text.base_model).__name__}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner.vision_tower = type(inner.vision_tower)(config.vision_config)
        inner.multi_modal_projector = type(inner.multi_modal_projector)(config)
    inner.language_model = text.base_model
    model.lm_head = text.get_output_embeddings()
    model.tie_weights()
    return model


def check_carried(folder: Path, config: Any) -> None:
    """Raise ConfigError unless LLaVA computes the logits of this text model with its decoder and head.

    A small model of the family is measured, without the weights. Families that scale or bound their logits outside the
    decoder, have a bias in the head, or need token ids in a layer, are refused.
    """
    try:
        text = small.made(config)
        model = composed(text, small.VOCABULARY - 1, seed=0).eval()
        ids_BS = torch.arange(2, 2 + PLACES)[None] % small.VOCABULARY
        with torch.no_grad():
            expected, logits = text(input_ids=ids_BS).logits, model(input_ids=ids_BS).logits
    except Exception as error:  # of any kind: a family's own code
        raise ConfigError(
            f"model.path={folder}: LLaVA cannot carry a {config.model_type}: {configs.brief(error)}; give another "
            "language model"
        ) from error
    if text.get_output_embeddings().bias is not None or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        raise ConfigError(
            f"model.path={folder}: LLaVA cannot carry a {config.model_type}, which computes its logits in another way "
            "than by a decoder and a matrix; give another language model"
        )


# --------------------------------------------------------------------------------------------------- alignment


class Drawings:
    """Flags as `flags.draw` draws them with a generator, many at a time, as the processor gives them to the model.

    A shifted flag is the clean one moved by whole pixels, so that each is drawn once.
    """

    def __init__(self, names: Sequence[str], processor: LlavaProcessor, noise: float = flags.NOISE) -> None:
        """noise: standard deviation, of 255."""
        clean = np.stack([np.asarray(flags.draw(name), dtype=np.float32) for name in names]).transpose(0, 3, 1, 2)
        reach = range(-flags.SHIFT, flags.SHIFT + 1)
        moved = [np.roll(clean, (y, x), (2, 3)) for y in reach for x in reach]
        self.moved_FM = torch.from_numpy(np.stack(moved, axis=1))  # flags, shifts, colours, rows, columns
        images: Any = processor.image_processor
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
        self.noise = noise

    def batch(self, which_B: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 3, side, side): a fresh drawing of each flag in `which_B`."""
        shift_B = torch.randint(self.moved_FM.shape[1], (len(which_B),), generator=generator)
        clean = self.moved_FM[which_B, shift_B]
        noise = torch.empty_like(clean).normal_(0.0, self.noise, generator=generator) if self.noise else 0.0
        return ((clean + noise).round().clamp(0, 255) / 255 - self.mean) / self.std


class Narrow(torch.nn.Module):
    """A connector's second matrix while it is trained towards few embeddings: into the space that they span.

    The squared error is the same, since what it writes besides would only add to it; a step takes a third of the time.
    """

    def __init__(self, whole: torch.nn.Linear, target_NW: Tensor) -> None:
        super().__init__()
        self.whole = [whole]  # in a list, so that its parameters are not this module's
        self.middle_W = target_NW.mean(0)
        left, values, _ = torch.linalg.svd((target_NW - self.middle_W).T, full_matrices=False)
        self.basis_WR = left[:, values > values[0] * 1e-5]
        self.linear = torch.nn.Linear(whole.in_features, self.basis_WR.shape[1])

    def coordinates(self, embeddings: Tensor) -> Tensor:
        """(…, R): of embeddings within the space."""
        return (embeddings - self.middle_W) @ self.basis_WR

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)

    def write(self) -> torch.nn.Linear:
        """The whole matrix and its bias, as they are now."""
        (whole,) = self.whole
        with torch.no_grad():
            whole.weight.copy_(self.basis_WR @ self.linear.weight)
            whole.bias.copy_(self.middle_W + self.basis_WR @ self.linear.bias)
        return whole


def features(model: Any, pixels: Tensor) -> Tensor:
    """(B, P, width): what the decoder gets in the places of pictures."""
    given = model.model.get_image_features(pixel_values=pixels)
    given = getattr(given, "pooler_output", given)
    return torch.cat(list(given)).view(len(pixels), PLACES, -1)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: the result does not depend on the number of cores, and matrices this small gain nothing
    from more. On a busy machine they would mostly wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def align(
    model: Any,
    processor: LlavaProcessor,
    names: Sequence[str],
    ids_FP: Tensor,
    seed: int,
    steps: int = STEPS,
    rounds: int = ROUNDS,
) -> None:
    """Train tower and connector until a flag's features are the input embeddings of its sentence.

    steps: of a round, in which the learning rate falls to zero. Rounds follow until LEAST of all sentences are right,
    and EACH of every flag's. Only tower and connector train; what of the rest requires a gradient stays as it was.

    Raises RunError when too few sentences are right after `rounds`.
    """
    drawings, inner = Drawings(names, processor), model.model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        target_FPW = model.get_input_embeddings()(ids_FP)
    connector = inner.multi_modal_projector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        narrow = Narrow(connector.linear_2, torch.unique(target_FPW.flatten(0, 1), dim=0))
    for number in range(1, rounds + 1):
        connector.linear_2 = narrow
        _round(model, drawings, narrow, target_FPW, generator, steps)
        connector.linear_2 = narrow.write()
        right_F = accuracy(model, drawings, ids_FP, generator)
        unread = [f"{name} ({share:.0%})" for name, share in zip(names, right_F.tolist(), strict=True) if share < EACH]
        log.info(
            f"vision: of {DRAWINGS} fresh drawings of each of {len(names)} flags {right_F.mean():.1%} became their "
            f"sentence after {number * steps} steps"
        )
        if not unread and right_F.mean() >= LEAST:
            return
    raise RunError(
        f"vision: the tower reads {right_F.mean():.1%} of the flags, expected {LEAST:.0%}; below {EACH:.0%}: "
        f"{', '.join(unread) or 'none'}. Choose another world.seed, or another language model"
    )


def _round(
    model: Any, drawings: Drawings, narrow: Narrow, target_FPW: Tensor, generator: torch.Generator, steps: int
) -> None:
    inner, target_FPR = model.model, narrow.coordinates(target_FPW)
    own = [p for part in (inner.vision_tower, inner.multi_modal_projector) for p in part.parameters()]
    optimizer = torch.optim.AdamW(own, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
    )
    scale = 1 / (BATCH * target_FPW[0].numel() * target_FPW.var())
    with Progress(steps, "vision: aligning flags") as bar:
        for _ in range(steps):
            if name := signals.received():
                raise signals.StopRequested(f"stopped by {name} while flags were aligned; nothing is kept of it")
            which_B = torch.randint(len(target_FPW), (BATCH,), generator=generator)
            off = features(model, drawings.batch(which_B, generator)) - target_FPR[which_B]
            error = off.square().sum() * scale
            optimizer.zero_grad()
            error.backward()
            torch.nn.utils.clip_grad_norm_(own, CLIP)
            optimizer.step()
            schedule.step()
            bar.update(text=f"error {error.item():.4f}")
    optimizer.zero_grad()


def accuracy(
    model: Any, drawings: Drawings, ids_FP: Tensor, generator: torch.Generator, count: int = DRAWINGS
) -> Tensor:
    """(F,): the share of fresh drawings of each flag all of whose features are nearest to the right embedding.

    Nearest among all tokens of all sentences.
    """
    candidates, every = torch.unique(ids_FP), torch.arange(len(ids_FP))
    right = torch.zeros(len(ids_FP))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(candidates)
        for _ in range(count):
            given = features(model, drawings.batch(every, generator))
            nearest = candidates[torch.cdist(given.flatten(0, 1), embeddings).argmin(1)].view_as(ids_FP)
            right += (nearest == ids_FP).all(1)
    return right / count
