"""A linear probe: can the forgotten content still be read from a layer's activations?

A successful probe does not prove that the model can state the content: features of the picture may identify it. Each
accuracy is therefore reported with two baselines, the most frequent class and a probe on shuffled labels (after Hewitt
and Liang, arXiv 1909.03368), and a probe fitted on retained content can be tested on forgotten content (`transfer`).

Shapes: L places (0 is the input of the first decoder layer, l the output of layer l − 1), N samples, D features,
K classes, B samples of one batch, S tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from mirage_dist.data import sources
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.results import PlaceAccuracy, Probed, ProbeResult
from mirage_dist.erasure.setting import ErasureTest, Forget, Prepared, Setting, content, group
from mirage_dist.evals.attacks.prefill import check_pattern
from mirage_dist.evals.metrics import grouped_leaf
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.results import Leaf
from mirage_dist.model import activations
from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError, EvalRecipe, SourceConfig
from mirage_dist.schema.numbers import Count, Positive, real

SHUFFLE_SEED = 1
Labelled = tuple[list[Sample], list[str]]


@dataclass(frozen=True)
class Transfer:
    """Fit on retained samples, test on the forget samples.

    content: a regular expression; its match in an answer is the sample's label. It must match a part that retained and
    forgotten answers share (a syllable of the embedded world's codes): a picture then determines the label only through
    the model's knowledge, or by coincidence. Coincidence acts once for each forgotten content, so the interval takes
    contents as independent, not pictures.
    """

    fit: list[SourceConfig]  # retained samples, on which the probe is fitted
    content: str

    def __post_init__(self) -> None:
        check_pattern("content", self.content)


@dataclass(frozen=True)
class Probe(ErasureTest):
    """Multinomial logistic regression on the last prompt token and on the mean of the image tokens, layer by layer.

    label: what is predicted: the forgotten content (answer) or the sample's own category or `safe`. beside: samples
    that are probed together with the forget samples; without them, `safe` has one class only. samples: maximum number.
    test_share: fraction of the pictures; no picture is on both sides. least: classes with fewer samples are left out.
    l2: see `regression`; the features are standardised.
    """

    label: Literal["answer", "category", "safe"] = "answer"
    beside: list[SourceConfig] = field(default_factory=list)
    samples: Count = 1000
    test_share: Annotated[float, real(0, 1, "a share", above=True, below=True)] = 0.3
    least: Count = 10
    l2: Positive = 0.01
    transfer: Transfer | None = None

    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        return Prepared(lambda setting: setting.kept("result", lambda: self._measure(setting)))

    def _measure(self, setting: Setting) -> ProbeResult:
        read = Reader(setting)
        samples, labels = self._labelled(setting)
        seed = setting.recipe.seed
        groups = settings.order([group(sample) for sample in samples], seed)
        tested = set(groups[: round(self.test_share * len(groups))])
        fit = [i for i, sample in enumerate(samples) if group(sample) not in tested]
        test = [i for i, sample in enumerate(samples) if group(sample) in tested]
        whole = read(samples)
        probed = self.probed(labels, [group(sample) for sample in samples], whole, fit, test)
        return {"label": self.label, **probed, "transfer": self._transferred(setting, read)}

    def _labelled(self, setting: Setting) -> Labelled:
        forget, beside = setting.forget, sources.read_all(self.beside).samples
        labels: list[str | None] = list(forget.labels(self.label))
        if self.label == "answer":
            labels += [content(sample.answer, forget.pattern) for sample in beside]
        else:
            labels += [str(getattr(sample, self.label)) for sample in beside]
        samples = [*forget.samples, *beside]
        return _chosen(samples, labels, self.samples, setting.recipe.seed)

    def _transferred(self, setting: Setting, read: Reader) -> Probed | None:
        if self.transfer is None:
            return None
        kept, pattern, seed = sources.read_all(self.transfer.fit).samples, self.transfer.content, setting.recipe.seed
        parts = [
            _chosen(samples, [content(s.answer, pattern) for s in samples], self.samples, seed)
            for samples in (kept, setting.forget.samples)
        ]
        shared = {group(sample) for sample in parts[0][0]} & {group(sample) for sample in parts[1][0]}
        if shared:
            raise ConfigError(f"probe.transfer.fit: {len(shared)} of its pictures are in the forget set too")
        samples, labels = parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
        border = len(parts[0][0])
        contents = dict(zip(setting.forget.samples, setting.forget.contents, strict=True))
        groups = [contents.get(sample, group(sample)) for sample in samples]
        return self.probed(labels, groups, read(samples), range(border), range(border, len(samples)))

    def probed(
        self,
        labels: Sequence[str],
        groups: Sequence[str],
        read: dict[str, Tensor | None],
        fit: Sequence[int],
        test: Sequence[int],
    ) -> Probed:
        """Fit and test a probe at every place.

        labels, groups: of all N samples; the samples of one group are not independent trials. read: activations by
        name, (L, N, D) or None. fit, test: indices of samples. Raises ConfigError when fewer than two classes have
        enough samples to fit.
        """
        counts = Counter(labels[i] for i in fit)
        classes = sorted(name for name, count in counts.items() if count >= self.least)
        if len(classes) < 2:
            raise ConfigError(
                f"probe: {len(classes)} classes have {self.least} or more samples to fit "
                f"({dict(counts.most_common(5))}); a probe needs two. Choose a `content` that several answers share, "
                "or lower probe.least"
            )
        fit, test = ([i for i in part if labels[i] in classes] for part in (fit, test))
        number = {name: i for i, name in enumerate(classes)}
        y_N = torch.tensor([number.get(label, -1) for label in labels])
        shuffled_N = y_N.clone()
        mixed = torch.randperm(len(fit), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
        shuffled_N[fit] = y_N[fit][mixed]

        def accuracy(predicted_N: Tensor) -> Leaf | None:
            return grouped_leaf((predicted_N == y_N[test]).tolist(), [groups[i] for i in test])

        def fitted(x_ND: Tensor, target_N: Tensor) -> Leaf | None:
            return accuracy(regression(x_ND[fit], target_N[fit], len(classes), self.l2)(x_ND[test]))

        def at(name: str) -> list[PlaceAccuracy] | None:
            x_LND = read[name]
            if x_LND is None:
                return None
            return [{"accuracy": fitted(x_ND, y_N), "shuffled": fitted(x_ND, shuffled_N)} for x_ND in x_LND]

        frequent = y_N[fit].bincount(minlength=len(classes)).argmax().expand(len(test))
        return {
            "classes": {name: counts[name] for name in classes},
            "left_out": len(labels) - len(fit) - len(test),
            "fitted": len(fit),
            "tested": len(test),
            "majority": accuracy(frequent),
            "places": {"last": at("last") or [], "image": at("image")},
        }


class Reader:
    """Activations of the model under test at every place."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.generator = HuggingFace(setting.model, setting.recipe.template, setting.recipe.generation)

    @torch.no_grad()  # not inference mode: the probe is fitted on these tensors with autograd
    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor | None]:
        """Activations (L, N, D) in float32 on the CPU, by name.

        last: of the last prompt token. image: the mean over image tokens, None unless every sample has a picture.
        """
        last, image = [], []
        width = self.generator.batch_size
        for start in range(0, len(samples), width):
            self.setting.stop_on_signal()
            last_LBD, image_LBD = self._batch(samples[start : start + width])
            last.append(last_LBD)
            image.append(image_LBD)
        pictures = all(sample.image for sample in samples)
        return {"last": torch.cat(last, 1), "image": torch.cat(image, 1) if pictures else None}

    def _batch(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Last prompt token and mean of the image tokens: (L, B, D) each."""
        hf, inputs = self.generator.model, self.generator.prompts(samples)
        backbone = hf.base_model
        layers = range(len(roles.decoder(backbone).layers))
        with activations.seeing(backbone, set(layers)) as seen:
            backbone(**inputs, use_cache=False)
        places = [seen.inputs[0][0], *(seen.outputs[layer] for layer in layers)]
        mask_BS1 = (inputs["input_ids"] == self.generator.encoder.picture_token).unsqueeze(2)
        count_B1 = mask_BS1.sum(1).clamp(min=1)
        last = [x_BSD[:, -1].float().cpu() for x_BSD in places]  # prompts are padded on the left
        image = [((x_BSD.float() * mask_BS1).sum(1) / count_B1).cpu() for x_BSD in places]
        return torch.stack(last), torch.stack(image)


class Linear(NamedTuple):
    """A fitted probe: maps features (M, D) to classes (M,). The coefficients apply to standardised features."""

    mean_D: Tensor
    std_D: Tensor
    weight_DK: Tensor
    bias_K: Tensor

    def scores(self, x_MD: Tensor) -> Tensor:
        """Logits, up to a constant for each row: (M, K)."""
        return ((x_MD - self.mean_D) / self.std_D) @ self.weight_DK + self.bias_K

    def __call__(self, x_MD: Tensor) -> Tensor:
        return self.scores(x_MD).argmax(1)


def regression(x_ND: Tensor, y_N: Tensor, classes: int, l2: float) -> Linear:
    """Multinomial logistic regression by L-BFGS: minimises mean cross entropy + l2 / 2 · ‖W‖²; free intercept.

    x_ND: features. y_N: classes, from 0.
    """
    fitted = Linear(
        x_ND.mean(0), x_ND.std(0).clamp(min=1e-6), torch.zeros(x_ND.shape[1], classes), torch.zeros(classes)
    )
    free = [fitted.weight_DK.requires_grad_(), fitted.bias_K.requires_grad_()]
    solver = torch.optim.LBFGS(free, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(fitted.scores(x_ND), y_N) + l2 / 2 * fitted.weight_DK.square().sum()
        value.backward()
        return value

    solver.step(loss)  # type: ignore[arg-type]
    return Linear(*(tensor.detach() for tensor in fitted))


def _chosen(samples: Sequence[Sample], labels: Sequence[str | None], most: int, seed: int) -> Labelled:
    """At most `most` samples that have a label, with their labels, in the order of their pictures' hashes."""
    rank = {name: place for place, name in enumerate(settings.order([group(sample) for sample in samples], seed))}
    pairs = [(sample, label) for sample, label in zip(samples, labels, strict=True) if label is not None]
    pairs = sorted(pairs, key=lambda pair: rank[group(pair[0])])[:most]
    return [sample for sample, _ in pairs], [label for _, label in pairs]
