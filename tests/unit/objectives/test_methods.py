"""Every further method against its published formula, written anew over whole logits in float64: value and gradient.

The formulas are those of open-unlearning (src/trainer/utils.py and src/trainer/unlearn/*.py of
github.com/locuslab/open-unlearning at d3d7cf9) and of TRL's DPOTrainer (`sigmoid`), on labels of which −100 is no
token. Where theirs is a mean over a micro-batch, the batch here is whole.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_dist.objectives.base import View, make
from mirage_dist.objectives.retaining import Retaining
from mirage_dist.schema import ConfigError

IGNORE, VOCABULARY = -100, 131
LENGTHS = {"forget": (4, 1, 3), "idk": (2, 5, 1), "retain": (3, 2, 4)}  # response tokens of each sequence
NAMES = {"chosen": "idk", "rejected": "forget"}


@dataclass
class Rows:
    """A stream's logits (B, S, V) of policy and reference, and labels (B, S), as a trainer has them."""

    logits: Tensor
    reference: Tensor
    labels: Tensor

    @property
    def shifted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both, and the labels that they predict."""
        return self.logits[:, :-1], self.reference[:, :-1], self.labels[:, 1:]

    def view(self, rows: slice = slice(None), penalty: float = 0.0) -> View:
        """What the forward computes of these rows."""
        logits, reference, labels = (part[rows] for part in self.shifted)
        kept = labels != IGNORE
        logp, ref_logp = logits[kept].log_softmax(-1), reference[kept].log_softmax(-1)
        picked = labels[kept][:, None]
        soft = (reference[kept] - penalty * F.one_hot(labels[kept], VOCABULARY)).softmax(-1)
        return View(
            sequences=len(labels),
            segment_N=kept.nonzero()[:, 0],
            logp_N=logp.gather(1, picked).squeeze(1),
            ref_logp_N=ref_logp.gather(1, picked).squeeze(1),
            kl_M=(ref_logp.exp() * (ref_logp - logp)).sum(-1),
            distilled_N=-(soft * logp).sum(-1),
        )


@pytest.fixture
def batch():
    generator, streams = torch.Generator().manual_seed(0), {}
    for name, lengths in LENGTHS.items():
        shape = (len(lengths), 9)
        labels = torch.full(shape, IGNORE)
        for row, length in enumerate(lengths):
            labels[row, 3 : 3 + length] = torch.randint(VOCABULARY, (length,), generator=generator)
        logits, reference = (torch.randn(*shape, VOCABULARY, generator=generator).double() for _ in range(2))
        streams[name] = Rows(logits.requires_grad_(), reference, labels)
    return streams


# ------------------------------------------------------------------------------------------------- published formulas


def nll(logits, labels):
    """open-unlearning's `compute_batch_nll`: the sum over a sequence's tokens."""
    return F.cross_entropy(logits.transpose(-1, -2), labels, ignore_index=IGNORE, reduction="none").sum(-1)


def simnpo(batch, beta=2.5, delta=0.0):
    logits, _, labels = batch["forget"].shifted
    mean = nll(logits, labels) / (labels != IGNORE).sum(-1) - delta
    return -F.logsigmoid(beta * mean).mean() * 2 / beta


def ratios(rows):
    logits, reference, labels = rows.shifted
    return -(nll(logits, labels) - nll(reference, labels))


def idk_dpo(batch, beta=0.1):
    return -2 / beta * F.logsigmoid(beta * (ratios(batch["idk"]) - ratios(batch["forget"]))).mean()


def dpo(batch, beta=0.1):
    """TRL: −logsigmoid(β · ((log π_chosen − log π_rejected) − (the reference's))), the mean over pairs."""
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        [-nll(rows.shifted[which], rows.shifted[2]) for rows in (batch["idk"], batch["forget"])] for which in (0, 1)
    )
    return -F.logsigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()


def reweighted(batch, weight):
    logits, _, labels = batch["forget"].shifted
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -(weight((-loss).exp().detach()) * loss)[labels.flatten() != IGNORE].mean()


def wga(batch, beta=1.0):
    return reweighted(batch, lambda p: p**beta)


def satimp(batch, beta1=5.0, beta2=1.0):
    return reweighted(batch, lambda p: p**beta1 * (1 - p) ** beta2)


def undial(batch, beta=10.0):
    """Where theirs has a mean over all positions, label −100 indexing the vocabulary, this has the labelled ones."""
    logits, teacher, labels = (part.flatten(0, 1) for part in batch["forget"].shifted)
    kept = labels != IGNORE
    mask = torch.zeros_like(teacher[kept]).scatter_(1, labels[kept][:, None], 1.0)
    return F.cross_entropy(logits[kept], (teacher[kept] - mask * beta).softmax(-1), reduction="none").mean()


def retain_ce(batch):
    logits, _, labels = batch["retain"].shifted
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def retain_kl(batch):
    """`compute_kl_divergence`: kl_div with `batchmean` over rows; here over those that predict a response token."""
    logits, reference, labels = batch["retain"].shifted
    kept = labels != IGNORE
    own, other = logits[kept].log_softmax(-1), reference[kept].log_softmax(-1)
    return F.kl_div(own, other, reduction="batchmean", log_target=True)


# name, options -> the published loss without its retain term
METHODS = {
    "simnpo": ({"name": "simnpo"}, simnpo),
    "simnpo with a margin": ({"name": "simnpo", "beta": 4.5, "gamma": 1.35}, lambda b: simnpo(b, 4.5, 0.3)),
    "dpo": ({"name": "dpo"}, dpo),
    "dpo, beta 1": ({"name": "dpo", "beta": 1.0}, lambda b: dpo(b, 1.0)),
    "idk_dpo": ({"name": "idk_dpo"}, idk_dpo),
    "wga": ({"name": "wga"}, wga),
    "wga, beta .3": ({"name": "wga", "beta": 0.3}, lambda b: wga(b, 0.3)),
    "satimp": ({"name": "satimp"}, satimp),
    "satimp, no importance": ({"name": "satimp", "beta2": 0.0}, lambda b: satimp(b, 5.0, 0.0)),
    "undial": ({"name": "undial"}, undial),
    "undial, beta 3": ({"name": "undial", "beta": 3.0}, lambda b: undial(b, 3.0)),
    "graddiff": ({"name": "graddiff"}, lambda b: wga(b, 0.0)),
}


def total(objective, batch, rows=slice(None)):
    """The loss of some sequences of each stream, divided by the counts of all of them."""
    views = {n: batch[NAMES.get(n, n)].view(rows, objective.needs.penalty) for n in objective.needs.streams}
    counts = {}
    for name in objective.needs.streams:
        tokens = sum(LENGTHS[NAMES.get(name, name)])
        counts |= {f"{name}.tokens": tokens, f"{name}.kl_positions": tokens, f"{name}.sequences": 3}
    terms = [t for t in objective(views) if hasattr(t, "weight")]
    return sum(t.weight * t.sum / counts[t.count] for t in terms)


def close(mine, oracle, batch):
    torch.testing.assert_close(mine, oracle)
    leaves = [rows.logits for rows in batch.values()]
    grads = [torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (mine, oracle)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("retain", ["none", "ce", "kl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_each_retain_term_is_the_published_formula(batch, method, retain):
    options, formula = METHODS[method]
    objective = make({**options, "retain": retain, "retain_weight": 0.7})
    assert objective.needs.reference == bool(objective.needs.ref_logp or objective.needs.distil or retain == "kl")
    kept = {"none": lambda _: 0.0, "ce": retain_ce, "kl": retain_kl}[retain]
    close(total(objective, batch), formula(batch) + 0.7 * kept(batch), batch)


@pytest.mark.parametrize("retain", ["ce", "kl"])
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up_to_the_whole(batch, method, retain):
    objective = make({**METHODS[method][0], "retain": retain})
    close(sum(total(objective, batch, rows) for rows in (slice(0, 1), slice(1, 3))), total(objective, batch), batch)


@pytest.mark.parametrize("name", ["simnpo", "wga", "satimp", "undial", "idk_dpo"])
def test_the_forget_term_has_its_weight_and_the_answers_to_forget_are_declared(batch, name):
    plain, weighted = (total(make({"name": name, "retain": "none", "forget_weight": w}), batch) for w in (1.0, 0.125))
    torch.testing.assert_close(weighted, 0.125 * plain)
    assert make({"name": name}).needs.unlearned == ("forget",)


def test_undials_gradient_of_the_logits_is_p_minus_the_lowered_reference(batch):
    objective, rows = make({"name": "undial", "beta": 4.0}), batch["forget"]
    (grad,) = torch.autograd.grad(total(objective, batch), rows.logits)
    logits, reference, labels = rows.shifted
    kept = labels != IGNORE
    q = (reference[kept] - 4.0 * F.one_hot(labels[kept], VOCABULARY)).softmax(-1)
    torch.testing.assert_close(grad[:, :-1][kept], (logits[kept].softmax(-1) - q).detach() / 8)
    assert not grad[:, :-1][~kept].any()


def test_open_unlearnings_undial_lowers_an_entry_of_the_vocabulary_at_every_masked_position(batch):
    """Its label −100 is the vocabulary's hundredth entry from the end, where nothing is to be forgotten."""
    _, teacher, labels = batch["forget"].shifted
    mask = torch.zeros_like(teacher)
    rows, places = torch.arange(3).view(-1, 1, 1), torch.arange(8).view(1, -1, 1)
    mask[rows, places, labels.unsqueeze(-1)] = 1.0
    assert (mask[labels == IGNORE].argmax(-1) == VOCABULARY - 100).all()


def test_a_reweighted_tokens_gradient_is_its_weight(batch):
    logp = torch.tensor([-1e-6, -0.1, -1.0, -5.0, -80.0], dtype=torch.float64, requires_grad=True)
    view = View(sequences=1, logp_N=logp, segment_N=torch.zeros(5, dtype=torch.int64))
    (term,) = make({"name": "satimp", "retain": "none"})({"forget": view})
    (grad,) = torch.autograd.grad(term.sum, logp)
    p = logp.detach().exp()
    torch.testing.assert_close(grad, p**5 * (1 - p), rtol=1e-9, atol=0)


def test_dpos_logged_rewards_are_trls(batch):
    objective = make({"name": "dpo", "beta": 0.5})
    logged = {v.name: v.sum / 3 for v in objective({n: batch[NAMES[n]].view() for n in NAMES})}
    chosen, rejected = (0.5 * ratios(batch[NAMES[n]]) for n in NAMES)
    torch.testing.assert_close(logged["reward_chosen"], chosen.mean())
    torch.testing.assert_close(logged["reward_rejected"], rejected.mean())
    torch.testing.assert_close(logged["preferred"], (chosen > rejected).double().mean())


def test_every_objective_that_forgets_by_likelihoods_has_the_retain_terms():
    for name in ("graddiff", "npo", *{options["name"] for options, _ in METHODS.values()}):
        objective = make({"name": name, "retain": "kl", "kl_positions": "unpadded"})
        assert isinstance(objective, Retaining)
        assert (objective.needs.kl, objective.needs.kl_positions) == (("retain",), "unpadded")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "simnpo", "beta": 0}, "beta"),
        ({"name": "undial", "kl_positions": "all"}, "kl_positions=all: belongs to retain=kl .got none."),
        ({"name": "wga", "retain": ["ce", "kl"]}, "retain.*ce, kl, none"),
        ({"name": "satimp", "beta": 1.0}, "unknown key .objective.beta."),
        ({"name": "idk_dpo", "retain": "nll"}, "allowed: ce, kl, none"),
        ({"name": "rmu", "ce_weight": 1.0, "kl_weight": 1.0}, "kl_weight=1.0, ce_weight=1.0: .*set one of them to 0"),
        ({"name": "rmu", "layers": []}, "expected one or more different layers"),
        ({"name": "rmu", "layers": [3, 3]}, "expected one or more different layers"),
        ({"name": "rmu", "layers": [3, -1]}, r"layers\[1\]"),
        ({"name": "rmu", "layer": 3, "layers": [3, 4]}, "give one of the two"),
        ({"name": "rmu", "coeff_of": "norm"}, "constant, reference_norm"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        make(options)


# ------------------------------------------------------------------------------------------------------------- RMU


def drawn(seed):
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rmu_at_several_layers_with_the_references_norm_is_the_papers_formula():
    """Adaptive RMU, eq. of arXiv:2408.06223: ‖h − β ‖h_ref‖ u‖², at each position, over the layers."""
    objective = make({"name": "rmu", "layers": [1, 3], "coeff": 5.0, "coeff_of": "reference_norm", "ce_weight": 0.0})
    objective.start(hidden_size=5, seed=3)
    mask = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.float64)
    forget, retain = ({layer: drawn(layer + 10 * n).requires_grad_() for layer in (1, 3)} for n in (0, 1))
    ref_forget, ref_retain = ({layer: drawn(layer + 10 * n) for layer in (1, 3)} for n in (2, 3))
    views = {
        "forget": View(sequences=2, activations_BSD=forget, ref_activations_BSD=ref_forget, mask_BS=mask),
        "retain": View(sequences=2, activations_BSD=retain, ref_activations_BSD=ref_retain, mask_BS=mask),
    }
    terms = objective(views)
    assert [t.name for t in terms] == ["forget_1", "retain_1", "forget_3", "retain_3"]
    loss = sum(t.weight * t.sum / 5 for t in terms)
    unit = objective.state_dict()["control_D"].double() / 5.0
    oracle = 0.0
    for layer in (1, 3):
        for place in mask.nonzero().tolist():
            b, s = place
            target = 5.0 * ref_forget[layer][b, s].norm() * unit
            oracle = oracle + ((forget[layer][b, s] - target) ** 2).mean() / 5
            oracle = oracle + ((retain[layer][b, s] - ref_retain[layer][b, s]) ** 2).mean() / 5
    torch.testing.assert_close(loss, oracle, rtol=1e-6, atol=1e-6)  # the control vector is drawn in float32
    leaves = [*forget.values(), *retain.values()]
    grads = [torch.autograd.grad(x, leaves) for x in (loss, oracle)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_rmu_with_kl_keeps_the_answers_too():
    objective = make({"name": "rmu", "ce_weight": 0.0, "kl_weight": 2.0, "retain_weight": 0.0, "layers": [1]})
    needs = objective.needs
    assert (needs.streams, needs.kl, needs.depth, needs.reference) == (("forget", "retain"), ("retain",), None, True)
    objective.start(hidden_size=5, seed=3)
    views = {
        "forget": View(sequences=2, activations_BSD={1: drawn(0)}, mask_BS=torch.ones(2, 4)),
        "retain": View(sequences=2, kl_M=torch.tensor([0.5, 0.25])),
    }
    steer, kl = objective(views)
    assert (kl.name, kl.weight, kl.sum, kl.count) == ("retain_kl", 2.0, 0.75, "retain.kl_positions")
    assert steer.name == "forget_1"
