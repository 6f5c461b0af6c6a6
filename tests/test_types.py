"""A user's script under mypy, with the package as `make` installs it: right words pass, wrong ones are flagged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import torch
from childtune_fast import ChildAdamW, ChildNetwork, FisherAccumulator, bernoulli_mask, estimate_fisher
from childtune_fast.fisher import estimate_fisher as the_same
from childtune_fast.integrations.config import ChildTuningConfig
from childtune_fast.optimizer import ChildAdamW as TheSame

model = torch.nn.Linear(3, 3)
scores: dict[str, torch.Tensor] = estimate_fisher(model, [], names="weight", offload="cpu", max_batches=3)
child: ChildNetwork = ChildNetwork.from_scores(model, scores, reserve_p=0.3, scope="tensor", maskable="weight")
optimizer: torch.optim.AdamW = ChildAdamW(model.parameters(), lr=torch.tensor(1e-3), child=child)
TheSame(model.named_parameters(), decay="all", variant="hf", norm_of="child", backend="native", seed=3)
TheSame(model.parameters(), state="8bit", rounding="stochastic")
TheSame([{"params": model.parameters(), "lr": 1e-2}], decay="auto", variant="torch", norm_of="all", backend="auto")
ChildTuningConfig(mode="D", decay="child", variant="hf", scope="global", refresh_every="epoch")
ChildTuningConfig(mode="F", state="bfloat16", rounding="nearest")
mask: torch.Tensor = bernoulli_mask((3, 3), 0.3, seed=0, step=1, param_index=0)
optimizer.replace_child(child)  # wrong: torch's AdamW has no such method
ChildAdamW(model.parameters(), decay="some")  # wrong
ChildAdamW(model.parameters(), variant="HF")  # wrong
ChildAdamW(model.parameters(), norm_of="parent")  # wrong
ChildAdamW(model.parameters(), backend="cuda")  # wrong
ChildAdamW(model.parameters(), state="int8")  # wrong
ChildAdamW(model.parameters(), rounding="up")  # wrong
ChildAdamW(model.parameters(), child=scores)  # wrong
ChildAdamW(model.parameters(), reserve=0.3)  # wrong
ChildNetwork.from_scores(model, scores, reserve_p=0.3, scope="layer")  # wrong
ChildNetwork.from_scores(model, scores)  # wrong: no reserve_p
ChildTuningConfig(mode="d")  # wrong
ChildTuningConfig(mode="D", scope="layer")  # wrong
estimate_fisher(model, [], offload="disk")  # wrong
the_same(model, [], parameters="weight")  # wrong
FisherAccumulator(model, offload="disk")  # wrong
number: int = ChildAdamW(model.parameters()).seed + "1"  # wrong
"""
PLAIN = {"arg-type", "attr-defined", "call-arg", "operator"}  # which mypy flags without being strict, too


@pytest.mark.slow
def test_right_words_pass_and_wrong_ones_are_flagged(tmp_path):
    (tmp_path / "user.py").write_text(SCRIPT)
    # Strict, as `make types`, whose cache of torch's types it shares: without that it takes as long as `make types`.
    options = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
    command = [sys.executable, "-m", "mypy", *options, "user.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    where = [sys.executable, "-c", "import childtune_fast; print(childtune_fast.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(ROOT), "another checkout is installed here: run `make test`"
    errors = re.findall(r"^user\.py:(\d+): error: .*\[([a-z-]+)\]$", ran.stdout, re.MULTILINE)
    flagged = {int(line) for line, _ in errors}
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if "# wrong" in line}
    assert flagged == wrong, ran.stdout + ran.stderr
    assert {code for _, code in errors} == PLAIN, ran.stdout
