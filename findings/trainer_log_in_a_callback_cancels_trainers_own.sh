#!/usr/bin/env bash
# A callback that logs through Trainer at the end of a step cancels Trainer's own log of that step.
#
# One would assume: trainer.log(numbers) adds a row, so that a callback which logs numbers of its own every few steps changes
#   nothing in what Trainer logs: loss, learning rate and gradient norm still come at every logging_steps.
# What happens: Trainer marks its own log as due before it calls the callbacks, on an object that they share, and any log takes
#   the mark away. Where both fall on the same step, the row with the loss is left out, without a word; with a callback that
#   logs every step, no loss is logged before the summary at the end.
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0. Seen on 2026-11-30.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 2>/dev/null
cat >"$folder/look.py" <<'PY'
import tempfile

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).square().mean()}


class Log(TrainerCallback):
    def __init__(self, every):
        self.every = every

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0:
            self.trainer.log({"mine": 1.0})


for every in (0, 3, 1):
    data = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 12
    args = TrainingArguments(tempfile.mkdtemp(), max_steps=12, per_device_train_batch_size=1, logging_steps=2,
                             report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    log = Log(every)
    log.trainer = trainer = Trainer(Line(), args, train_dataset=data, callbacks=[log])
    trainer.train()
    print("losses at steps:", *[row["step"] for row in trainer.state.log_history if "loss" in row])
PY
found=$("$folder/env/bin/python" "$folder/look.py" | grep 'losses at')
printf 'no log, every third step, every step:\n%s\n' "$found"
[ "$found" = "losses at steps: 2 4 6 8 10 12
losses at steps: 2 4 8 10
losses at steps:" ]
