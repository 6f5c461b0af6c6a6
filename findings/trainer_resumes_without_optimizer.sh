#!/usr/bin/env bash
# Trainer resumes without the optimizer's state if the scheduler's file is missing, and says nothing of it.
#
# One would assume: a checkpoint with optimizer.pt resumes with what is in it; or, if anything that belongs to it is missing,
#   Trainer raises or warns, as it does for arguments that differ.
# What happens: optimizer and scheduler are loaded if both files are there, and neither otherwise. Without scheduler.pt, which
#   a clean-up or a copy by patterns loses easily, the run goes on from its step with an optimizer that has no state, and
#   with a schedule that begins anew.
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0. Seen on 2026-11-29.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 2>/dev/null
cat >"$folder/look.py" <<'PY'
import os
import tempfile

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).square().mean()}


class Look(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        if state.global_step == 2:
            optimizer = getattr(optimizer, "optimizer", optimizer)
            print(len(optimizer.state), lr_scheduler.last_epoch)


def train(folder, resume=None):
    data = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 4
    args = TrainingArguments(folder, max_steps=4, per_device_train_batch_size=1, save_steps=2, report_to="none",
                             use_cpu=True, disable_tqdm=True, logging_strategy="no")
    trainer = Trainer(Line(), args, train_dataset=data, callbacks=[Look()])
    trainer.train(resume_from_checkpoint=resume)


folder = tempfile.mkdtemp()
train(folder)
train(folder, f"{folder}/checkpoint-2")
os.remove(f"{folder}/checkpoint-2/scheduler.pt")
train(folder, f"{folder}/checkpoint-2")
PY
found=$(HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/look.py")
printf '%s\n' "$found"
# States and place in the schedule before the third step: not interrupted, resumed, and resumed without the scheduler's file.
[ "$(grep -E '^[0-9]+ [0-9]+$' <<<"$found" | paste -sd';')" = "2 2;2 2;0 0" ]
