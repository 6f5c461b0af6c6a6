"""`python -m benchmarks.fisher_batches` and `.fisher_shares`: docs/fisher.md has them, and a pass is its parts' sum."""

import json

import pytest
import torch
from fisher_models import make_batches
from models import Block
from torch import nn

from benchmarks import fisher_batches, fisher_shares
from benchmarks.finetune import compare, runs
from childtune_fast import ChildNetwork, estimate_fisher

RESULTS = json.loads(fisher_batches.RESULTS.read_text(encoding="utf-8"))
SCORED = json.loads(fisher_shares.RESULTS.read_text(encoding="utf-8"))


def test_the_documented_tables_are_the_programs():
    page = (fisher_batches.DOCS / "fisher.md").read_text(encoding="utf-8")
    for program, results in ((fisher_batches, RESULTS), (fisher_shares, SCORED)):
        assert f"{program.BEGIN}\n{program.table(results)}\n{program.END}" in page
    assert "(fisher-batches.svg)" in page


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    fisher_batches.draw(RESULTS, tmp_path / "picture.svg")
    assert "MRPC" in (tmp_path / "picture.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", fisher_batches.TASKS)
def test_the_results_are_whole(task):
    record = RESULTS["tasks"][task]
    assert {what: len(orders) for what, orders in record["overlap"].items()} == dict.fromkeys(
        fisher_batches.FORMULAS, fisher_batches.ORDERS
    )
    for share in map(str, fisher_batches.SHARES):
        for formula, orders in record["overlap"].items():
            assert orders[0][share][str(record["batches"])] == 1.0, formula
            assert list(map(int, orders[0][share])) == fisher_batches.ends(record["batches"])


def test_the_child_networks_by_share_are_those_of_runs_with_scores():
    """They have as many weights in each tensor."""
    reported = compare.by_task(runs.read_all(fisher_shares.RESULTS.parent / "finetune" / "runs"), "report")
    methods = reported[fisher_shares.TASK]
    assert len(SCORED["overlap"]) == len(SCORED["counts"]) == fisher_shares.SEEDS
    for seed, (of_seed, counts) in enumerate(zip(SCORED["overlap"], SCORED["counts"], strict=True)):
        assert list(of_seed) == list(map(str, fisher_shares.SHARES))
        assert all(list(map(int, of)) == fisher_batches.ends(SCORED["batches"]) for of in of_seed.values())
        assert {of[str(SCORED["batches"])] for of in of_seed.values()} == {1.0}
        for end in (*fisher_shares.SCORED, SCORED["batches"]):
            (run,) = (
                one for one in methods[f"d-{end}-batches" if end < SCORED["batches"] else "d"] if one["seed"] == seed
            )
            assert run["data"]["fingerprint"] == SCORED["fingerprint"]
            assert " ".join(str(count) for *_, count, _ in run["density"]) == counts[str(end)]


def test_where_child_networks_are_chosen():
    assert fisher_batches.ends(5) == [1, 2, 4, 5]
    assert fisher_batches.ends(8) == [1, 2, 4, 8]
    assert fisher_batches.ends(230, last=64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("formula", fisher_batches.FORMULAS)
def test_parts_of_a_pass_add_up_to_the_pass(formula):
    """Batches of unequal sizes, which weigh the same in one formula and by their examples in the other."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"layers": nn.ModuleList(Block(6) for _ in range(2)), "head": nn.Linear(6, 3)})
    sizes = [4, 3, 4, 2, 4]
    batches = [
        {"x": batch["x"][:size], "y": batch["y"][0][:size]} for batch, size in zip(make_batches(), sizes, strict=True)
    ]

    def loss(net, batch):
        x = batch["x"]
        for layer in net["layers"]:
            x = x + layer.mlp(layer.attention(x))
        return nn.functional.cross_entropy(net["head"](x), batch["y"])

    order = [[i] * size for i, size in enumerate(sizes)]
    found = dict(fisher_batches.children(net, order, lambda indices: batches[indices[0]], loss, formula))
    assert list(found) == [1, 2, 4, 5]
    for end, of in found.items():
        by_example = formula == "example"
        scores = estimate_fisher(net, batches[:end], loss_fn=loss, per_example=by_example, progress=False)
        for share, child in of.items():
            assert child.overlap(ChildNetwork.from_scores(net, scores, reserve_p=share)) == 1.0
    assert torch.tensor([of[0.1].overlap(found[5][0.1]) for of in found.values()]).min() < 1.0
