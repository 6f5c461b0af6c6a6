"""DeepSpeed's CPUAdam, a contestant where it is installed: the fused AdamW for CPUs that others use."""

import functools
import warnings


@functools.cache
def load_deepspeed_adam() -> type | None:
    """Returns DeepSpeed's class of optimizer; None if it is not installed, or if its operation does not compile.

    It is compiled at the first use on a machine, which takes a minute or two, and kept by torch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of DeepSpeed itself; the tests' configuration makes warnings errors
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
            from deepspeed.ops.op_builder import CPUAdamBuilder

            CPUAdamBuilder().load()
        except ImportError:
            return None
        except Exception as error:  # of whatever kind: a compiler, a driver or a header that is missing
            print(f"DeepSpeed is installed, but does not take part: {error}")
            return None
    return DeepSpeedCPUAdam
