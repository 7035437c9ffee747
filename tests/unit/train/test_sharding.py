"""hpZ's number follows the nodes, and what would cross them unseen is refused."""

import json

import pytest

from mirage_dist import config as configs
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.engine import deepspeed_config
from mirage_dist.train.planning import sharding


@pytest.fixture
def config(tmp_path):
    """The completed JSON's hpZ number for this `zero_optimization`."""

    def completed(ranks, node, size, **zero):
        file = tmp_path / "hpz.json"
        tree = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size, **zero}}
        file.write_text(json.dumps(tree))
        recipe = configs.load("configs/train/sft.yaml", [f"deepspeed={file}", "train.micro_batch=1"], TrainRecipe)
        return deepspeed_config(recipe, ranks, 1, node)["zero_optimization"]["zero_hpz_partition_size"]

    return completed


@pytest.mark.parametrize(
    ("ranks", "node", "size", "secondary"),
    [
        (64, 8, "auto", 8),
        (16, 4, "auto", 4),
        (8, 8, "auto", 1),  # one node: its second copy would be the first one
        (4, 1, "auto", 1),
        (1, 1, "auto", 1),
        (16, 8, 4, 4),
        (16, 4, 8, 8),  # a link that spans nodes
        (8, 8, 8, 1),
        (8, None, "auto", 1),  # before the nodes are known
        (8, None, 4, 4),
    ],
)
def test_a_group_is_a_node_or_a_part_of_one(config, ranks, node, size, secondary):
    assert config(ranks, node, size) == secondary


@pytest.mark.parametrize(
    ("ranks", "node", "size", "words"),
    [
        (8, 8, 3, "8 ranks do not divide into groups of 3; take auto .*, or one of 2, 4$"),
        (4, None, 8, "4 ranks do not divide into groups of 8"),
        (64, 4, 16 + 16, None),
        (32, 8, 16, None),
        (24, 8, 12, "a node has 8 ranks, so some groups would cross nodes; take auto, or 1, 2, 4, 8"),
        (24, 12, 8, "a node has 12 ranks"),
        (8, 8, 0, "expected a whole number above 0, or auto"),
        (8, 8, "8", "expected a whole number above 0, or auto"),
        (8, 8, True, "expected a whole number above 0, or auto"),
        (8, 8, 4.0, "expected a whole number above 0, or auto"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_by_name(config, ranks, node, size, words):
    if words is None:
        assert config(ranks, node, size) == size
        return
    with pytest.raises(ConfigError, match=f"hpz.json: zero_optimization.zero_hpz_partition_size=.*{words}"):
        config(ranks, node, size)


def test_stage_2_has_no_partitions_to_copy(config):
    with pytest.raises(ConfigError, match="only ZeRO stage 3 has partitioned parameters"):
        config(8, 4, "auto", stage=2)


@pytest.mark.parametrize(
    ("local_ranks", "size"), [([0], 1), ([0, 1], 2), ([0, 1, 0, 1], 2), ([0, 0, 0], 1), ([0, 1, 2, 0, 1, 2], 3)]
)
def test_nodes_are_runs_of_local_ranks(local_ranks, size):
    assert sharding.ranks_of_a_node(local_ranks) == size


@pytest.mark.parametrize(
    ("local_ranks", "words"),
    [
        ([0, 0, 1, 1], "do not follow each other.*0, 0, 1, 1.*--distribution=block"),  # srun --distribution=cyclic
        ([0, 1, 0, 0, 1], "nodes have 2, 1, 2 ranks"),
        ([1, 0], "do not follow each other"),
        ([0, 2, 1], "do not follow each other"),
    ],
)
def test_ranks_that_are_not_in_the_order_of_nodes_are_refused(local_ranks, words):
    with pytest.raises(ConfigError, match=words):
        sharding.ranks_of_a_node(local_ranks)


@pytest.mark.parametrize(
    ("name", "idle"), [("zero3", True), ("zero3_offload", False), ("zero2", False), ("zero3_hpz", True)]
)
def test_stage_3_without_offload_has_nothing_to_do_for_one_process(name, idle):
    zero = json.loads(configs.find(f"configs/deepspeed/{name}.json").read_text())["zero_optimization"]
    assert sharding.idle(zero) is idle
