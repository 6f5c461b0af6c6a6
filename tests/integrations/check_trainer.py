"""ChildTuningTrainer under FSDP2: both modes, their checkpoints, and child networks that change."""

import pytest
import torch
from sharded_runs import (
    KINDS,
    Sharded,
    assert_close,
    assert_only_child_moved,
    assert_same,
    fsdp2,
    make,
    unwrapped,
    whole_weights,
)
from trainer_runs import D, F, make_best, make_model, optimizer_of
from transformers import set_seed

from childtune_fast import ChildNetwork, estimate_fisher
from childtune_fast.integrations.transformers import CHILD_FILE, ChildTuningConfig, ChildTuningTrainer
from childtune_fast.ops.packed_mask import fingerprint

HALF_WAY = {"save_strategy": "steps", "save_steps": 3}


def f_takes_the_steps_of_data_parallelism_and_resumes(folder):
    alone = make(folder / "whole", F, trainer=ChildTuningTrainer)
    alone.train()
    for kind in KINDS:
        trainer = make(folder / kind, F, **fsdp2(kind), **HALF_WAY)
        trainer.train()
        weights = whole_weights(trainer.model)
        assert_close(weights, whole_weights(alone.model))
        resumed = make(folder / kind, F, **fsdp2(kind))
        resumed.train(f"{folder}/{kind}/checkpoint-3")
        assert_same(whole_weights(resumed.model), weights)


def d_chooses_on_the_shards_and_resumes(folder):
    """The child network is that of one process with the batches of both; the checkpoint has it once, and whole."""
    ways = {
        KINDS[0]: fsdp2(),
        KINDS[1]: fsdp2(KINDS[1]),
        "weights from rank 0": fsdp2(cpu_ram_efficient_loading=True),
        "recomputed": fsdp2(activation_checkpointing=True),
    }
    for name, way in ways.items():
        trainer = make(folder / name, D, **way, **HALF_WAY)
        trainer.create_optimizer()
        assert trainer.child_network is None
        trainer.train()
        child, weights = trainer.child_network, whole_weights(trainer.model)
        assert child.overlap(chosen_by_one_process(trainer)) > 0.995  # rounding of sums in another order
        assert_only_child_moved(child, weights)
        assert all(group["decay"] == "child" for group in trainer.optimizer.param_groups)
        saved = ChildNetwork.load(folder / name / "checkpoint-3" / CHILD_FILE, make_model())
        masks = unwrapped(child.masks())
        assert all(torch.equal(mask, masks[name]) for name, mask in saved.masks().items())
        resumed = make(folder / name, D, **way)
        for _ in range(1 if name == "recomputed" else 2):  # accelerate cannot prepare that twice
            resumed.train(f"{folder}/{name}/checkpoint-3")
            assert_same(whole_weights(resumed.model), weights)


def chosen_by_one_process(trainer):
    """The child network by the batches that both processes have together, by a model that is whole."""
    set_seed(trainer.args.seed)
    loader = trainer.get_train_dataloader()
    batches = [{key: trainer.accelerator.gather(value) for key, value in batch.items()} for batch in loader]
    scores = estimate_fisher(make_model(), batches, progress=False)
    names = [name for name, _ in trainer.model.named_parameters()]
    wrapped = {name: scores[plain] for plain, name in unwrapped({name: name for name in names}).items()}
    return ChildNetwork.from_scores(trainer.model, wrapped, reserve_p=0.3)


def the_child_network_changes_with_epochs_and_to_the_best(folder):
    """Also where an evaluation leaves parameters whole, and where training, but not estimation, adds up gradients."""
    for kind, sharded_again, accumulated in zip(KINDS, (True, False), (1, 2), strict=True):
        options = fsdp2(kind, reshard_after_forward=sharded_again)
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulated}
        trainer, notes = make_best(folder / kind, trainer=Sharded, **options)
        trainer.train()
        assert len({child.fingerprint for child in notes.children}) == 3
        best = notes.children[1].fingerprint
        assert trainer.child_network.fingerprint == best
        assert fingerprint(optimizer_of(trainer).child_masks.values()) == best
        best = {name: weight.full_tensor() for name, weight in notes.weights[1].items()}
        assert_same(whole_weights(trainer.model), best)


def bf16_is_the_models_own(folder):
    """FSDP2 casts weights and gradients itself; autocast would cast in the estimation, but not in the training."""
    trainer, seen = make(folder, D, **fsdp2(), bf16=True), []
    trainer.model.classifier.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert seen == [False] * (3 + 6)  # the batches of the estimation, and the steps
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def what_cannot_be_done_is_said_at_once(folder):
    with pytest.raises(ValueError, match=r"per_example must be False under FSDP2 \(got True\).*leave it out"):
        make(folder, ChildTuningConfig(mode="D", per_example=True), **fsdp2())
    with pytest.raises(ValueError, match=r"mode='D' needs whole parameters or FSDP2's.*got FSDP version 1"):
        make(folder, D, **fsdp2(version=1, sync_module_states=False))


CHECKS = (
    f_takes_the_steps_of_data_parallelism_and_resumes,
    d_chooses_on_the_shards_and_resumes,
    the_child_network_changes_with_epochs_and_to_the_best,
    bf16_is_the_models_own,
    what_cannot_be_done_is_said_at_once,
)
