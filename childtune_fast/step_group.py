"""What one step does to parameters of one group: the struct that every backend's `step` takes."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class StepGroup:
    """The parameters of a group that have a gradient, their state, and the group's hyper-parameters as plain numbers.

    The lists run in parallel, one entry for each parameter. csrc/python/step_items.h reads these names.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    grad_factor: float  # clip factor / GradScaler's scale, negative if maximize
    keep_threshold: int  # of 65536: round(reserve_p * 65536)
    published_code: bool  # variant="hf"
    seed: int  # unsigned, 64 bits
    max_grad_norm: float | None
    lr_on_device: Tensor | None = None  # on the GPU that steps the group: the learning rate, in place of `lr`
    capturable: bool = False  # a CUDA graph may replay the step
    decay_outside: bool = False  # weights outside the child network decay too
    child_norm: bool = False  # norm_of="child": only the child network's gradient counts in the norm
    slices: list[tuple[int, int, int]] | None = None  # of sharded parameters: sharding.mask_slice; else None
    params: list[Tensor] = field(default_factory=list)  # float32, float64, bfloat16 or float16; any shape and strides
    grads: list[Tensor] = field(default_factory=list)  # dtype and shape of the parameter; never written
    # Shape of the parameter, or the child network's values alone; float32, or float64 for float64.
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)  # empty without amsgrad
    steps: list[Tensor] = field(default_factory=list)  # one float32 or float64 each: steps taken so far; counted up
    indices: list[int] = field(default_factory=list)  # of the parameters in the optimizer, through all groups
    child_bits: list[Tensor] = field(default_factory=list)  # of packed_mask.PackedMask; empty without a child network
    child_offsets: list[Tensor] = field(default_factory=list)  # likewise
    child_counts: list[int] = field(default_factory=list)  # likewise
