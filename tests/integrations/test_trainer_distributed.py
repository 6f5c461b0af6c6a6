"""Two processes over gloo: ChildTuningTrainer's replicas have one child network, of the scores of all data."""

import sys

import pytest
import torch
import torch.distributed as dist
from helpers import same_bits
from ranks import launch

WORLD = 2


def same_everywhere(tensor):
    parts = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(parts, tensor.detach())
    return all(same_bits(part, tensor) for part in parts)


def trained(folder, config, **options):
    from trainer_runs import make_model, make_trainer

    model = make_model()
    trainer = make_trainer(folder, config, model=model, arguments_={"per_device_train_batch_size": 2, **options})
    trainer.train()
    assert trainer.args.world_size == WORLD
    assert trainer.state.global_step == 6
    for param in model.parameters():
        assert same_everywhere(param)
    return trainer


def ranks_agree(folder):
    """With both modes, and with child networks that are chosen anew amid the training."""
    import transformers
    from trainer_runs import BOTH, D

    from childtune_fast import ChildNetwork
    from childtune_fast.integrations.transformers import CHILD_FILE, ChildTuningConfig

    for config in (*BOTH.values(), ChildTuningConfig(mode="D", refresh_every="epoch")):
        trainer = trained(folder, config, save_strategy="steps", save_steps=3)
        if config.mode == "D":
            saved = ChildNetwork.load(f"{folder}/checkpoint-6/{CHILD_FILE}", trainer.model)
            assert saved.fingerprint == trainer.child_network.fingerprint
            if int(transformers.__version__.partition(".")[0]) < 5:
                continue  # they cannot load an optimizer's state on the CPU where there are ranks
            before = [p.detach().clone() for p in trainer.model.parameters()]
            trainer.train(f"{folder}/checkpoint-3")
            assert config is not D or all(map(same_bits, trainer.model.parameters(), before))


def ranks_take_the_best(folder):
    """The best checkpoint's child network if every rank finds it, else the one that all have."""
    from trainer_runs import make_best, optimizer_of

    from childtune_fast.ops.packed_mask import fingerprint

    for output, kept in ((f"{folder}/shared", 1), (f"{folder}/of rank {dist.get_rank()}", 2)):
        trainer, notes = make_best(output, per_device_train_batch_size=2)
        trainer.train()
        assert trainer.child_network.fingerprint == notes.children[kept].fingerprint
        assert fingerprint(optimizer_of(trainer).child_masks.values()) == notes.children[kept].fingerprint
        assert kept == 2 or all(map(same_everywhere, trainer.model.parameters()))


def scores_are_of_all_data(folder):
    """Batches of one example: then the mean over both ranks is that over one process with all the data."""
    from trainer_runs import D, make_data, make_model, make_trainer

    from childtune_fast import ChildNetwork, estimate_fisher

    options = {"per_device_train_batch_size": 1}
    trainer = make_trainer(folder, D, model=make_model(), arguments_=options)
    trainer.create_optimizer()
    batches = [{key: torch.tensor([value]) for key, value in example.items()} for example in make_data()]
    scores = estimate_fisher(make_model(), batches, progress=False)
    expected = ChildNetwork.from_scores(trainer.model, scores, reserve_p=0.3)
    assert trainer.child_network.overlap(expected) > 0.995  # rounding of sums in another order


def a_loss_function_counts_its_own_labels(folder):
    """Trainer multiplies its loss by the number of processes, as it counts the labels of all of them in training."""
    from trainer_runs import D, make_model, make_trainer

    from childtune_fast.integrations.scores import fisher_scores

    def loss(outputs, labels, num_items_in_batch):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    for across in (True, False):
        options = {"per_device_train_batch_size": 2, "average_tokens_across_devices": across}
        own, other = (
            fisher_scores(make_trainer(folder, D, model=make_model(), arguments_=options, **more), D, epoch=0)
            for more in ({}, {"compute_loss_func": loss})
        )
        for name, score in own.items():
            torch.testing.assert_close(other[name], score, rtol=1e-4, atol=1e-12)


def run_checks(folder):
    for check in (ranks_agree, ranks_take_the_best, scores_are_of_all_data, a_loss_function_counts_its_own_labels):
        check(folder)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
def test_two_processes():
    launch(run_checks, WORLD)
