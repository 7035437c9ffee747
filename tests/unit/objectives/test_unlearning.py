"""NPO and RMU against their formulas written out sequence by sequence, values and gradients in float64."""

from dataclasses import replace

import pytest
import torch

from mirage_dist.objectives.base import View, make
from mirage_dist.schema import ConfigError

LENGTHS = (4, 1, 3)
SEGMENT = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(terms, counts):
    return sum(t.weight * t.sum / counts[t.count] for t in terms)


@pytest.mark.parametrize("reduction", ["seq_sum", "seq_mean"])
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_npo_is_the_formula_and_its_gradient_is_damped_by_two_sigma(reduction, beta):
    logp, ref = draw(8).requires_grad_(), draw(8, seed=1)
    npo = make({"name": "npo", "beta": beta, "reduction": reduction, "retain": "none"})
    view = View(sequences=3, segment_N=SEGMENT, logp_N=logp, ref_logp_N=ref)
    loss = total(npo({"forget": view}), {"forget.sequences": 3})
    parts, weights = [], []
    for i, length in enumerate(LENGTHS):
        scale = 1 if reduction == "seq_sum" else 1 / length
        margin = scale * (logp.detach() - ref)[i == SEGMENT].sum()
        parts.append(-2 / beta * torch.log(torch.sigmoid(-beta * margin)))
        weights += [2 / 3 * torch.sigmoid(beta * margin) * scale] * length
    torch.testing.assert_close(loss, sum(parts) / 3)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.stack(weights))


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    logp, ref = draw(8).requires_grad_(), draw(8, seed=1)
    npo = make({"name": "npo", "beta": 1e-9, "retain": "none"})
    view = View(sequences=3, segment_N=SEGMENT, logp_N=logp, ref_logp_N=ref)
    total(npo({"forget": view}), {"forget.sequences": 3}).backward()
    torch.testing.assert_close(logp.grad, torch.full((8,), 1 / 3, dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("retain", ["ce", "kl"])
def test_npo_retain_term_is_a_token_mean_with_its_gradient(retain):
    """Of the logits z with p = softmax(z): (p − onehot(y)) / N for CE, (p − p_ref) / N for KL(reference ‖ policy)."""
    logits, ref = draw(5, 7, seed=2).requires_grad_(), draw(5, 7, seed=3).softmax(-1)
    labels = torch.tensor([3, 0, 6, 2, 2])
    logp = logits.log_softmax(-1)
    rows = logp.gather(1, labels[:, None]).squeeze(1) if retain == "ce" else (ref * (ref.log() - logp)).sum(-1)
    kept = View(sequences=1, logp_N=rows if retain == "ce" else None, kl_M=rows if retain == "kl" else None)
    forgotten = draw(8).requires_grad_()
    forget = View(sequences=3, segment_N=SEGMENT, logp_N=forgotten, ref_logp_N=draw(8))
    counts = {"forget.sequences": 3, "retain.tokens": 5, "retain.kl_positions": 5}
    npo = make({"name": "npo", "retain": retain, "retain_weight": 3.0, "forget_weight": 0.0})
    loss = total(npo({"forget": forget, "retain": kept}), counts)
    torch.testing.assert_close(loss, (-3 if retain == "ce" else 3) * rows.mean())
    loss.backward()
    target = torch.nn.functional.one_hot(labels, 7) if retain == "ce" else ref
    torch.testing.assert_close(logits.grad, 3 * (logits.detach().softmax(-1) - target) / 5)
    assert not forgotten.grad.any()


def rmu(**options):
    objective = make({"name": "rmu", "layer": 1, "coeff": 6.0, **options})
    objective.start(hidden_size=5, seed=3)
    return objective


def rmu_views(forget, retain):
    mask = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.float64)
    return {
        "forget": View(sequences=2, activations_BSD={1: forget}, mask_BS=mask),
        "retain": View(
            sequences=2,
            activations_BSD={1: retain},
            ref_activations_BSD={1: draw(2, 4, 5, seed=5)},
            mask_BS=mask,
            logp_N=draw(3),
        ),
    }


COUNTS = {"forget.positions": 5, "retain.positions": 5, "retain.tokens": 3}


def test_rmu_is_the_formula_with_its_gradient():
    forget, retain = (draw(2, 4, 5, seed=s).requires_grad_() for s in (6, 7))
    objective, views = rmu(retain_weight=0.3, ce_weight=2.0), rmu_views(forget, retain)
    loss = total(objective(views), COUNTS)
    control = objective.state_dict()["control_D"].double()
    marked = [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]
    reference = views["retain"].ref_activations_BSD[1]
    steer = sum(((forget[p] - control) ** 2).sum() for p in marked) / (5 * 5)
    keep = sum(((retain[p] - reference[p]) ** 2).sum() for p in marked) / (5 * 5)
    oracle = steer + 0.3 * keep - 2 * draw(3).mean()
    torch.testing.assert_close(loss, oracle)
    mine, theirs = (torch.autograd.grad(x, (forget, retain)) for x in (loss, oracle))
    torch.testing.assert_close(mine, theirs)


def test_rmu_by_sequences_is_the_mean_over_sequences_of_each_ones_own_mean():
    """As open-unlearning's `compute_activation_loss` means it, which divides each sequence by every length."""
    forget, retain = (draw(2, 4, 5, seed=s).requires_grad_() for s in (6, 7))
    segment_BS, segment_N = torch.arange(2)[:, None].expand(2, 4), torch.tensor([0, 0, 1])
    options = {"average": "sequences", "ce_average": "sequences", "ce_stream": "retain_ce"}
    objective, views = rmu(retain_weight=0.3, ce_weight=2.0, **options), rmu_views(forget, retain)
    views = {name: replace(view, segment_BS=segment_BS, segment_N=segment_N) for name, view in views.items()}
    views["retain_ce"] = replace(views["retain"], logp_N=draw(3, seed=9))
    assert objective.needs.streams == ("forget", "retain", "retain_ce")
    counts = {f"{name}.sequences": 2 for name in objective.needs.streams}
    loss = total(objective(views), counts)
    control, reference = objective.state_dict()["control_D"].double(), views["retain"].ref_activations_BSD[1]

    def mean(values, target):
        rows = []
        for row, marks in enumerate(views["forget"].mask_BS.bool()):
            wide = target if target.dim() == 1 else target[row][marks]
            rows.append(((values[row][marks] - wide) ** 2).mean())
        return sum(rows) / 2

    logp = draw(3, seed=9)
    cross_entropy = -(logp[:2].mean() + logp[2]) / 2
    oracle = mean(forget, control) + 0.3 * mean(retain, reference) + 2 * cross_entropy
    torch.testing.assert_close(loss, oracle)
    mine, theirs = (torch.autograd.grad(x, (forget, retain)) for x in (loss, oracle))
    torch.testing.assert_close(mine, theirs)


def test_the_mean_over_sequences_is_that_over_positions_where_they_are_equally_long():
    forget, retain = draw(2, 4, 5, seed=6), draw(2, 4, 5, seed=7)
    segment_BS = torch.arange(2)[:, None].expand(2, 4)
    views = {
        name: replace(view, mask_BS=torch.ones(2, 4), segment_BS=segment_BS)
        for name, view in rmu_views(forget, retain).items()
    }
    counts = {f"{name}.{what}": n for name in ("forget", "retain") for what, n in (("positions", 8), ("sequences", 2))}
    by_positions, by_sequences = (
        total(rmu(average=average, ce_weight=0.0)(views), counts) for average in ("positions", "sequences")
    )
    torch.testing.assert_close(by_positions, by_sequences)


def test_rmu_gradient_vanishes_at_the_control_vector():
    objective = rmu()
    at_control = objective.state_dict()["control_D"].double().expand(2, 4, 5).clone().requires_grad_()
    total(objective(rmu_views(at_control, draw(2, 4, 5))), COUNTS).backward()
    assert not at_control.grad.any()


def test_control_vector_follows_the_seed_alone_and_survives_a_checkpoint():
    torch.rand(7)
    first, again, other = rmu(), rmu(), make({"name": "rmu", "coeff": 6.0})
    other.start(hidden_size=5, seed=4)
    control = first.state_dict()["control_D"]
    assert torch.equal(control, again.state_dict()["control_D"])
    assert not torch.equal(control, other.state_dict()["control_D"])
    torch.testing.assert_close(control.norm(), torch.tensor(6.0))
    assert (control >= 0).all()
    other.load_state_dict(first.state_dict())
    assert torch.equal(control, other.state_dict()["control_D"])
    with pytest.raises(ConfigError, match="control_D"):
        other.load_state_dict({"other": control})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "npo", "beta": 0}, "beta"),
        ({"name": "npo", "reduction": "sum"}, "seq_sum"),
        ({"name": "rmu", "positions": "image"}, "unpadded"),
        ({"name": "rmu", "layer": -1}, "layer"),
        ({"name": "rmu", "control_D": 1}, "control_D"),
        ({"name": "rmu", "average": "tokens"}, "allowed: positions, sequences"),
        (
            {"name": "rmu", "ce_weight": 0, "ce_stream": "retain_ce"},
            "ce_stream=retain_ce: belongs to the cross entropy",
        ),
        ({"name": "rmu", "ce_weight": 0, "ce_average": "sequences"}, "ce_average=sequences: .* ce_weight is 0"),
        ({"name": "npo", "kl_positions": "all"}, "kl_positions=all: belongs to retain=kl .got ce."),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        make(options)


def parity(**options):
    return make({"name": "npo", "reduction": "batch_mean", "beta": 0.9, "ce_weight": 1.0, **options})


def parity_views(rows: slice, grad: bool = False):
    """Forget, retain and retain_ce rows `rows` of a batch of eight tokens each."""
    views = {}
    for seed, name in enumerate(("forget", "retain", "retain_ce")):
        logp = draw(8, seed=seed)[rows].requires_grad_(grad)
        views[name] = View(sequences=1, logp_N=logp, ref_logp_N=draw(8, seed=seed + 10)[rows])
    return views


def test_parity_mode_is_the_published_codes_loss():
    views = parity_views(slice(None), grad=True)
    loss = total(parity(retain_weight=0.7, forget_weight=1.5)(views), {"micro_batches": 1})
    rise = {name: -v.logp_N.mean() + v.ref_logp_N.mean() for name, v in views.items()}
    sigma = {name: torch.log(torch.sigmoid(0.9 * x)) * 2 / 0.9 for name, x in rise.items()}
    oracle = -1.5 * sigma["forget"] + 0.7 * sigma["retain"] - views["retain_ce"].logp_N.mean()
    torch.testing.assert_close(loss, oracle)
    leaves = [v.logp_N for v in views.values()]
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(oracle, leaves))


def test_parity_mode_depends_on_the_micro_batch_and_the_formula_does_not():
    whole = total(parity()(parity_views(slice(None))), {"micro_batches": 1})
    halves = [total(parity()(parity_views(part)), {"micro_batches": 2}) for part in (slice(0, 4), slice(4, 8))]
    assert not torch.isclose(whole, sum(halves), rtol=1e-3)

    logp, ref = draw(8), draw(8, seed=1)
    npo = make({"name": "npo", "retain": "none"})

    def view(keep, first, count):
        return {"forget": View(count, SEGMENT[keep] - first, logp[keep], ref[keep])}

    counts = {"forget.sequences": 3}
    parts = total(npo(view(SEGMENT < 2, 0, 2)), counts) + total(npo(view(SEGMENT == 2, 2, 1)), counts)
    torch.testing.assert_close(parts, total(npo(view(SEGMENT < 3, 0, 3)), counts))


@pytest.mark.parametrize("options", [{"retain": "kl"}, {"ce_weight": None}, {"reduction": "seq_sum", "ce_weight": 1.0}])
def test_options_that_belong_to_another_mode_are_refused(options):
    with pytest.raises(ConfigError, match="batch_mean"):
        parity(**options)
