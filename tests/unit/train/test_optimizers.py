"""Optimizers by name, parameter groups by pattern, and whole parameters out of flat pieces."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from mirage_dist import config as configs
from mirage_dist.model import load
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.checkpoints.fragments import check_state
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.optimizers import base, groups
from mirage_dist.train.optimizers.partitions import Slice
from mirage_dist.train.optimizers.whole import WholeParameters, owners
from mirage_dist.train.planning.check import check_inputs, check_recipe

NAMES = [name for name in base.REGISTRY if name != "adamw8bit" or importlib.util.find_spec("bitsandbytes")]
SHAPES = {"layer.weight": (80, 70), "layer.bias": (80,), "embed.weight": (30, 20), "conv.weight": (4, 3, 5, 5)}


@pytest.fixture
def recipe(toy, tmp_path):
    def build(*overrides, name="npo") -> TrainRecipe:
        own = [*toy.overrides(name, tmp_path / "run"), *overrides]
        return configs.load(f"configs/train/demo_{name}.yaml", own, TrainRecipe)

    return build


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.optimizer.name=adamv"], r"unknown optimizer; .*'adamw'.*adafactor, muon, or module:Class"),
        (["train.optimizer.name=lion"], r"expected one of adamw, adamw8bit, adafactor, muon, or module:Class"),
        (["train.optimizer.name=torch.optim:SGD"], r"not a subclass of .*docs/optimizers\.md"),
        (["train.optimizer.beta=1"], r"unknown key 'train\.optimizer\.beta'; did you mean 'betas'\?"),
        (
            ["train.optimizer={name: adafactor, clip: 0}"],
            r"train\.optimizer\.clip=0\.0; expected a number of at least 1",
        ),
        (
            ["train.groups=[{match: conector, lr: 1}]"],
            r"groups\[0\]\.match: 'conector' matches no parameter; roles here",
        ),
        (
            ["train.groups=[{match: '*projctor*'}]"],
            r"matches no parameter; roles here: decoder, head, connector, vision",
        ),
        (["train.groups=[{match: vision, lr: 1}]"], "matches only parameters that do not train"),
        (["train.groups=[{match: '*'}, {match: head}]"], r"groups\[1\]\.match: .* are in earlier groups; move this"),
        (["train.groups=[{match: []}]"], r"groups\[0\]\.match=\[\]; expected at least one pattern"),
    ],
)
def test_a_wrong_optimizer_or_group_is_named_before_weights_load(recipe, overrides, words):
    with pytest.raises(ConfigError, match=words):
        check_inputs(check_recipe(recipe(*overrides), 2))


def test_the_old_key_is_answered_with_the_new_one(recipe):
    with pytest.raises(ConfigError, match=r"'train\.betas' is now called 'train\.optimizer\.betas'"):
        recipe("train.betas=[0.9, 0.95]")


@pytest.mark.skipif("adamw8bit" in NAMES, reason="bitsandbytes is installed")
def test_a_missing_package_is_named(recipe):
    with pytest.raises(ConfigError, match="needs the package bitsandbytes, which is not installed"):
        check_recipe(recipe("train.optimizer.name=adamw8bit"), 2)


def test_whole_parameters_are_not_offloaded(recipe, tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    check_recipe(recipe(f"deepspeed={tmp_path}/ds.json"), 2)
    with pytest.raises(ConfigError, match="Muon updates whole parameters; remove offload_optimizer, or use adamw"):
        check_recipe(recipe(f"deepspeed={tmp_path}/ds.json", "train.optimizer.name=muon"), 2)


def test_groups_part_the_trained_parameters_and_the_schedule_scales_each(recipe):
    made = recipe(
        "train.groups=[{match: connector, lr: 0.004}, {match: ['*norm*', head], weight_decay: 0.5}]", "train.lr=0.001"
    )
    policy = load.weightless(made.model)
    parts = groups.split(policy, made.train)
    trained = [name for name, p in policy.hf.named_parameters() if p.requires_grad]
    assert sorted(name for part in parts for name in part["names"]) == sorted(trained)
    assert [part["match"] for part in parts] == [None, ["connector"], ["*norm*", "head"]]
    assert all("projector" in name for name in parts[1]["names"])
    assert all("norm" in name or "lm_head" in name for name in parts[2]["names"])
    assert [(part["lr"], part["weight_decay"]) for part in parts] == [(0.001, 0.0), (0.004, 0.0), (0.001, 0.5)]
    optimizer = torch.optim.SGD([{**part, "params": [nn.Parameter(torch.zeros(1))]} for part in parts])
    for step in range(10):
        rate = learning_rate(made.train, step, 10)
        rates = groups.set_rates(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate * 4, rate]
        assert rates == {"connector": rate * 4, "*norm*+head": rate}


def whole_parameters(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def with_rates(parameters: dict[str, nn.Parameter]) -> base.Groups:
    common = {"lr": 1e-2, "weight_decay": 0.1}
    first, *rest = parameters
    return [
        {"params": [parameters[first]], "names": [first], **common},
        {"params": [parameters[name] for name in rest], "names": rest, **common, "lr": 3e-2},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_whole_parameters_out_of_flat_pieces_are_updated_as_without_zero(name):
    options = base.make({"name": name})
    expected = whole_parameters(1)
    plain = options.make(with_rates(expected))
    wrapped = WholeParameters(with_rates(whole_parameters(1)), options.make)
    slices, flats, end = [], [], 0
    for number, group in enumerate(with_rates(whole_parameters(1))):
        flats.append(nn.Parameter(torch.cat([*(p.detach().flatten() for p in group["params"]), torch.zeros(7)])))
        end = 0
        for title in group["names"]:
            size = math.prod(SHAPES[title])
            slices.append(Slice(title, SHAPES[title], 0, size, flats[-1], end, number))
            end += size
        wrapped.param_groups[number]["params"] = [flats[-1]]  # as DeepSpeed does
    wrapped.attach(slices, Group(0, 0, 1, torch.device("cpu")))
    for step in range(4):
        gradients = whole_parameters(step + 10)
        for title, parameter in expected.items():
            parameter.grad = gradients[title].detach().clone()
        for flat in flats:
            flat.grad = torch.zeros_like(flat)
        for piece in slices:
            piece.of(piece.flat.grad).copy_(gradients[piece.name].detach().flatten())  # type: ignore[arg-type]
        for optimizer in (plain, wrapped):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        plain.step()
        wrapped.step()
        for piece in slices:
            assert torch.equal(piece.of(piece.flat).view(piece.shape), expected[piece.name]), (name, step, piece.name)
    check_state(wrapped)
    for title, parameter in wrapped.own.items():
        state = [t for t in wrapped.state_of(parameter).values() if isinstance(t, torch.Tensor) and t.dim()]
        assert options.state_bytes(title, SHAPES[title]) == sum(t.nbytes for t in state), title


def test_every_rank_updates_about_as_many_elements():
    sizes = [1000, 10, 990, 5, 500, 495, 7, 3]
    chosen = owners(sizes, 2)
    loads = [sum(size for size, owner in zip(sizes, chosen, strict=True) if owner == rank) for rank in range(2)]
    assert abs(loads[0] - loads[1]) <= 10
    assert owners(sizes, 1) == [0] * 8


class Normed(torch.optim.Optimizer):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["norms"] = torch.zeros(3)


def test_an_optimizer_that_is_wrongly_called_elementwise_is_caught_in_its_first_step():
    optimizer = Normed([nn.Parameter(torch.zeros(8))], {})
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"norms has the shape \(3,\) .*set `elementwise = False`"):
        check_state(optimizer)
