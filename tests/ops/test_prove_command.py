"""`python -m childtune_fast prove`, and the report before and after it, with the stand-in driver as the GPUs."""

import os
import re

import pytest
import torch
from test_proof import with_gpus

from childtune_fast import __main__ as report


def check_the_command(capture=None):
    import contextlib
    import io

    torch.cuda.device_count = lambda: 2
    torch.cuda.get_device_name = lambda device: "stand-in"
    report.self_check = lambda native, device="cpu": (f"OK {device}", True)

    def output_of(status, *words):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert report.main(*words) == status
        return out.getvalue()

    before = output_of(0)
    assert before.count("torch, until its kernels, stand-in, are proved: by the first training, or by `python -m") == 2
    text = output_of(1, "prove")
    assert re.search(r"step of a random mask, float32 +1 of +1 right +0\.\d\d s", text)
    assert re.search(r"differs +0 of +1 right.*\n      : 1 of 3 values differ, first at 2", text)
    assert re.search(r"(?m)^for a bug report: GPU: stand-in; capability: .*; driver: CUDA 13000", text)
    assert text.count("proved on 20") == 1 + 1  # the verdict, and the line for a bug report
    after = output_of(0)
    assert re.search(r"serves cuda:0 +native \(kernels stand-in, proved on 20.* in \d+ s\)", after)
    assert re.search(r"serves cuda:1 +torch \(kernels stand-in, not proved: differs: 1 of 3 .*\(on 20.*\)\)", after)
    assert "self-check cuda:0 OK cuda:0" in after
    for name, word in (("CHILDTUNE_GPU", "off"), ("CHILDTUNE_GPU", "trust"), ("CHILDTUNE_BACKEND", "torch")):
        os.environ[name] = word
        wanted = "native (kernels stand-in, not proved: CHILDTUNE_GPU=trust" if word == "trust" else f"torch ({name}="
        assert f"serves cuda:0     {wanted}" in output_of(0)


def test_the_command_proves_and_reports(driver, tmp_path):
    with_gpus(driver, check_the_command, tmp_path, STAND_IN="tiny,differs")


def test_without_a_gpu_there_is_nothing_to_prove(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert report.main("prove") == 1
    assert capsys.readouterr().out == "there is no GPU that torch's CUDA can use, so there is nothing to prove\n"
