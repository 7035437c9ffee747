"""A linear probe: can what was forgotten still be read off a layer's activations?

What a probe reads is not proof that the model could tell it: a picture's own features may give it away. So each
accuracy stands beside two chances, the most frequent class and a probe on shuffled labels (after Hewitt and Liang,
arXiv 1909.03368), and a probe fitted on what was kept can be tried on what was forgotten (`transfer`).

Shapes: L places (0 is what goes into the first decoder layer, l what comes out of layer l − 1), N samples, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mirage_dist.data import sources
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.setting import Setting, content, group
from mirage_dist.evals.attacks.prefill import check_pattern
from mirage_dist.evals.metrics import Leaf, grouped_leaf
from mirage_dist.evals.models.generate import Generator
from mirage_dist.model import activations
from mirage_dist.schema import ConfigError, SourceConfig

SHUFFLE_SEED = 1
Labelled = tuple[list[Sample], list[str]]


@dataclass(frozen=True)
class Transfer:
    """Fit on samples of what the model was to keep, test on the forget samples.

    Both are labelled by what `content` finds in their answers, which has to be a part that both share (a syllable of
    the embedded world's codes): then a picture gives the label away only through the model's own knowledge of it, or by
    chance. That chance is drawn once a forgotten content, so the interval takes contents as independent, not pictures.
    """

    fit: list[SourceConfig]
    content: str

    def __post_init__(self) -> None:
        check_pattern("content", self.content)


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on the last prompt token and on the mean of the image tokens, layer by layer.

    label: what is read; answer is the forgotten content, category and safe are the sample's own. beside: samples
    probed together with the forget ones, without which `safe` would have one class.
    """

    label: Literal["answer", "category", "safe"] = "answer"
    beside: list[SourceConfig] = field(default_factory=list)
    samples: int = 1000  # at most so many are read
    test_share: float = 0.3  # of the pictures; none is on both sides
    least: int = 10  # a class with fewer samples is left out
    l2: float = 0.01  # weight of half the squared coefficients against the mean loss; features are standardised
    transfer: Transfer | None = None

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ConfigError(f"test_share={self.test_share}; expected a share between 0 and 1")
        if self.samples < 1 or self.least < 1 or self.l2 <= 0:
            raise ConfigError(f"samples={self.samples}, least={self.least}, l2={self.l2}; expected numbers above 0")

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """{"label", "classes", "left_out", "fitted", "tested", "majority": leaf, "places": {"last": [{"accuracy": leaf,
        "shuffled": leaf}, …], "image": […] or None}, "transfer": the same}. One entry a place, see above.
        """
        return setting.kept("result", lambda: self._measured(setting))

    def _measured(self, setting: Setting) -> dict[str, Any]:
        read = Reader(setting)
        samples, labels = self._labelled(setting)
        seed = setting.recipe.seed
        groups = settings.order([group(sample) for sample in samples], seed)
        tested = set(groups[: round(self.test_share * len(groups))])
        fit = [i for i, sample in enumerate(samples) if group(sample) not in tested]
        test = [i for i, sample in enumerate(samples) if group(sample) in tested]
        whole = read(samples)
        told = self._probed(labels, [group(sample) for sample in samples], whole, fit, test)
        return {"label": self.label, **told, "transfer": self._transferred(setting, read)}

    def _labelled(self, setting: Setting) -> Labelled:
        forget, beside = setting.forget, sources.read_all(self.beside).samples
        labels: list[str | None] = list(forget.labels(self.label))
        if self.label == "answer":
            labels += [content(sample.answer, forget.pattern) for sample in beside]
        else:
            labels += [str(getattr(sample, self.label)) for sample in beside]
        samples = [*forget.samples, *beside]
        return _chosen(samples, labels, self.samples, setting.recipe.seed)

    def _transferred(self, setting: Setting, read: Reader) -> dict[str, Any] | None:
        if self.transfer is None:
            return None
        kept, pattern, seed = sources.read_all(self.transfer.fit).samples, self.transfer.content, setting.recipe.seed
        parts = [
            _chosen(samples, [content(s.answer, pattern) for s in samples], self.samples, seed)
            for samples in (kept, setting.forget.samples)
        ]
        shown = {group(sample) for sample in parts[0][0]} & {group(sample) for sample in parts[1][0]}
        if shown:
            raise ConfigError(f"probe.transfer.fit: {len(shown)} of its pictures are in the forget set too")
        samples, labels = parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
        border = len(parts[0][0])
        told = dict(zip(setting.forget.samples, setting.forget.contents, strict=True))
        groups = [told.get(sample, group(sample)) for sample in samples]
        return self._probed(labels, groups, read(samples), range(border), range(border, len(samples)))

    def _probed(
        self,
        labels: Sequence[str],
        groups: Sequence[str],
        read: dict[str, Tensor | None],
        fit: Sequence[int],
        test: Sequence[int],
    ) -> dict[str, Any]:
        """Fit and test at every place. groups: samples of one are no independent trials.

        Raises ConfigError where fewer than two classes are left to fit.
        """
        counts = Counter(labels[i] for i in fit)
        classes = sorted(name for name, count in counts.items() if count >= self.least)
        if len(classes) < 2:
            raise ConfigError(
                f"probe: {len(classes)} classes with {self.least} or more to fit ({dict(counts.most_common(5))}); "
                "a probe needs two. Is `content` a part that answers share? Or lower probe.least"
            )
        fit, test = ([i for i in part if labels[i] in classes] for part in (fit, test))
        number = {name: i for i, name in enumerate(classes)}
        y_N = torch.tensor([number.get(label, -1) for label in labels])
        shuffled_N = y_N.clone()
        mixed = torch.randperm(len(fit), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
        shuffled_N[fit] = y_N[fit][mixed]

        def accuracy(said_N: Tensor) -> Leaf | None:
            return grouped_leaf((said_N == y_N[test]).tolist(), [groups[i] for i in test])

        def at(x_ND: Tensor) -> dict[str, Leaf | None]:
            return {
                name: accuracy(regression(x_ND[fit], goal_N[fit], len(classes), self.l2)(x_ND[test]))
                for name, goal_N in (("accuracy", y_N), ("shuffled", shuffled_N))
            }

        frequent = y_N[fit].bincount(minlength=len(classes)).argmax().expand(len(test))
        return {
            "classes": {name: counts[name] for name in classes},
            "left_out": len(labels) - len(fit) - len(test),
            "fitted": len(fit),
            "tested": len(test),
            "majority": accuracy(frequent),
            "places": {place: x if x is None else [at(x_ND) for x_ND in x] for place, x in read.items()},
        }


class Reader:
    """Activations of the model under test at every place."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.generator = Generator(setting.model, setting.recipe.template, setting.recipe.generation)

    @torch.no_grad()  # in inference mode the probe could not be fitted on them
    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor | None]:
        """last: of the last prompt token; image: the mean over image tokens, None unless every sample has a picture.

        (L, N, D) float32 on the CPU.
        """
        last, image = [], []
        width = self.generator.batch_size
        for start in range(0, len(samples), width):
            self.setting.stop_if_asked()
            last_LBD, image_LBD = self._batch(samples[start : start + width])
            last.append(last_LBD)
            image.append(image_LBD)
        shown = all(sample.image for sample in samples)
        return {"last": torch.cat(last, 1), "image": torch.cat(image, 1) if shown else None}

    def _batch(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        hf, inputs = self.generator.model, self.generator.prompts(samples)
        backbone = getattr(hf, hf.base_model_prefix)
        layers = range(len(activations.decoder(backbone).layers))
        with activations.seeing(backbone, set(layers)) as seen:
            backbone(**inputs, use_cache=False)
        places = [seen.inputs[0][0], *(seen.outputs[layer] for layer in layers)]
        mask_BS1 = (inputs["input_ids"] == self.generator.encoder.processor.image_token_id).unsqueeze(2)
        count_B1 = mask_BS1.sum(1).clamp(min=1)
        last = [x_BSD[:, -1].float().cpu() for x_BSD in places]  # prompts are padded on the left
        image = [((x_BSD.float() * mask_BS1).sum(1) / count_B1).cpu() for x_BSD in places]
        return torch.stack(last), torch.stack(image)


class Linear(NamedTuple):
    """A fitted probe: class of each row of (M, D) features, (M,). Coefficients are those of standardised features."""

    mean_D: Tensor
    std_D: Tensor
    weight_DK: Tensor
    bias_K: Tensor

    def scores(self, x_MD: Tensor) -> Tensor:
        """Log-odds up to a constant a row: (M, K)."""
        return ((x_MD - self.mean_D) / self.std_D) @ self.weight_DK + self.bias_K

    def __call__(self, x_MD: Tensor) -> Tensor:
        return self.scores(x_MD).argmax(1)


def regression(x_ND: Tensor, y_N: Tensor, classes: int, l2: float) -> Linear:
    """Fit a multinomial logistic regression by L-BFGS: the least mean cross entropy + l2 / 2 · ‖W‖², intercept free."""
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
    """Those that have a label, at most so many, whole pictures in the order of their hashes."""
    rank = {name: place for place, name in enumerate(settings.order([group(sample) for sample in samples], seed))}
    found = [(sample, label) for sample, label in zip(samples, labels, strict=True) if label is not None]
    found = sorted(found, key=lambda pair: rank[group(pair[0])])[:most]
    return [sample for sample, _ in found], [label for _, label in found]
