"""Helpers of the tests of accelerate's FSDP2 without a GPU.

accelerate takes FSDP on GPUs and the like alone. `on_the_cpu` says in one place that these processes have such devices;
all that follows is accelerate's and Trainer's own code. What only GPUs show is not covered: NCCL, streams, offloading
to the CPU (which pins memory), float16, and the choice of the device.
"""

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from helpers import same_bits
from trainer_runs import make_model, make_trainer

from childtune_fast.integrations.transformers import ChildTuningTrainer

WORLD = 2
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
# By default accelerate shards BertEmbeddings and then, again, the word embeddings in it, which torch refuses.
LAYERS = ["BertLayer"]


def on_the_cpu():
    """Lets the Accelerator that is made next take FSDP, though there is no GPU."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Sharded(ChildTuningTrainer):
    def create_accelerator_and_postprocess(self):
        on_the_cpu()
        super().create_accelerator_and_postprocess()


def fsdp2(kind=KINDS[0], **more):
    """Arguments of TrainingArguments."""
    config = {"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": LAYERS, **more}
    return {"fsdp": True, "fsdp_config": config}


def make(folder, config, trainer=Sharded, **options):
    options = {"per_device_train_batch_size": 2, **options}
    made = make_trainer(folder, config, trainer=trainer, arguments_=options)
    assert made.args.world_size == WORLD
    return made


def unwrapped(named):
    """Returns a mapping with the names that parameters have where nothing is recomputed."""
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in named.items()}


def whole_weights(model):
    named = unwrapped(dict(model.named_parameters()))
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in named.items()}


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(same_bits(weights[name], expected[name]) for name in expected)


def assert_close(weights, expected):
    """As close as gradients that were added in another order leave them: a hundredth of the way of one step."""
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-4, msg=name)


def assert_only_child_moved(child, weights):
    before = whole_weights(make_model())
    moved = []
    for name, mask in unwrapped(child.masks()).items():
        assert same_bits(weights[name][~mask], before[name][~mask])
        moved.append(not torch.equal(weights[name], before[name]))
    assert sum(moved) > len(moved) / 2  # a tensor may have no weight in it
