"""accelerate's own loop under FSDP2: a child network that is chosen before the model is sharded, or after."""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from sharded_runs import LAYERS, assert_only_child_moved, assert_same, on_the_cpu, whole_weights
from trainer_runs import make_data, make_model

from childtune_fast import ChildAdamW, ChildNetwork, estimate_fisher


def batches_of(size=2):
    data = [{key: torch.tensor(value) for key, value in example.items()} for example in make_data()]
    return torch.utils.data.DataLoader(data, batch_size=size)


def accelerator_on_the_cpu():
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    on_the_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=LAYERS,
        state_dict_type="SHARDED_STATE_DICT",
    )
    return Accelerator(fsdp_plugin=plugin)


def chosen_before(path):
    """The model fits on one device; all processes must then choose by the same data, or load one file."""
    accelerator, model, batches = accelerator_on_the_cpu(), make_model(), batches_of()
    scores = estimate_fisher(model, batches, progress=False)
    child = ChildNetwork.from_scores(model, scores, reserve_p=0.3)
    optimizer = ChildAdamW(model.parameters(), lr=1e-2, child=child)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    if accelerator.is_main_process:
        child.save(path)
    return accelerator, model, optimizer, batches, child


def chosen_after(path):
    """The model outgrows one device: the optimizer gets its child network when accelerate has sharded both."""
    accelerator, model, batches = accelerator_on_the_cpu(), make_model(), batches_of()
    optimizer = ChildAdamW(model.parameters(), lr=1e-2, reserve_p=1.0)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    scores = estimate_fisher(model, batches, progress=False)
    child = ChildNetwork.from_scores(model, scores, reserve_p=0.3)
    optimizer.optimizer.replace_child(child)
    if accelerator.is_main_process:
        child.save(path)
    return accelerator, model, optimizer, batches, child


def resumed(path, state):
    accelerator, model, batches = accelerator_on_the_cpu(), make_model(), batches_of()
    child = ChildNetwork.load(path, model)
    optimizer = ChildAdamW(model.parameters(), lr=1e-2, child=child)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    accelerator.load_state(state)
    return accelerator, model, optimizer, batches


def train(accelerator, model, optimizer, batches):
    model.eval()  # without dropout, so that runs can be compared
    for batch in batches:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def accelerates_own_loop(folder):
    alone = make_model()
    for begin, size in ((chosen_before, 2), (chosen_after, 4)):  # chosen after, a batch is that of both processes
        path, state = folder / begin.__name__ / "child.safetensors", folder / begin.__name__ / "state"
        path.parent.mkdir(parents=True, exist_ok=True)
        *run, child = begin(path)
        train(*run)
        run[0].save_state(state)
        train(*run)
        weights = whole_weights(run[1])
        assert_only_child_moved(child, weights)
        scores = estimate_fisher(alone, batches_of(size), progress=False)
        assert child.overlap(ChildNetwork.from_scores(alone, scores, reserve_p=0.3)) > 0.995
        run = resumed(path, state)
        train(*run)
        assert_same(whole_weights(run[1]), weights)


CHECKS = (accelerates_own_loop,)
