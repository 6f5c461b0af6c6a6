"""Parameters cut over 1, 2 and 4 ranks, on gloo: one spawn for each number of ranks, with all checks inside."""

import sys

import pytest
import torch.distributed as dist
from ranks import spawn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"),
]

MODULES = (
    "check_steps",
    "check_replicas",
    "check_selection",
    "check_child",
    "check_scores",
    "check_scoring",
    "check_sums",
)
ON_FEW = ("check_zero_scores", "check_not_finite", "check_scale", "check_recipes")  # of which four ranks tell no more
OF_CHECKPOINTS = ("check_checkpoints", "check_low_bit")  # which find those of other numbers of ranks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("world", [1, 4, 2])
def test_on_ranks(world, tmp_path, checkpoints):
    modules = MODULES if world == 4 else MODULES + ON_FEW
    spawn(world, {**dict.fromkeys(modules, tmp_path), **dict.fromkeys(OF_CHECKPOINTS, checkpoints)})


def test_one_rank_loads_what_all_have_saved(checkpoints):
    spawn(1, dict.fromkeys(OF_CHECKPOINTS, checkpoints), only="checkpoints_are_loaded")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_one_rank_on_a_device(device):
    spawn(1, {"check_device": device})
