"""ChildTuningTrainer, and accelerate's own loop, under FSDP2: two processes over gloo, with all checks inside."""

import os
import sys

import pytest
import torch.distributed as dist
from ranks import launch


def run_checks(folder):
    import check_accelerate  # here, since they import transformers and accelerate
    import check_trainer

    for check in (*check_trainer.CHECKS, *check_accelerate.CHECKS):
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # an Accelerator with FSDP leaves it behind
        check(folder / check.__name__)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
def test_two_processes():
    launch(run_checks)
