#!/usr/bin/env bash
# auto_find_batch_size goes on from the weights and averages that the attempt without memory left behind.
#
# One would assume: Trainer(auto_find_batch_size=True) finds the batch size, and then trains as if it had been given: the same steps
#   from the same weights.
# What happens: when a batch does not fit, the loop begins again at step 0 with a smaller one, but with the weights of the steps
#   that went well before, and with the optimizer's state of them. The first examples are trained on twice, and no log says so.
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
        self.batches = 0

    def forward(self, x, labels):
        self.batches += 1
        if self.batches == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")  # as torch says it
        return {"loss": (self.linear(x) - labels).square().mean()}


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        weight = model.linear.weight.item()
        optimizer = getattr(optimizer, "optimizer", optimizer)
        print(state.global_step, weight == first, len(optimizer.state))


data = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 32
args = TrainingArguments(tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=4, auto_find_batch_size=True,
                         use_cpu=True, report_to="none", disable_tqdm=True)
model = Line()
first = model.linear.weight.item()
Trainer(model, args, train_dataset=data, callbacks=[Look()]).train()
PY
found=$(HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/look.py" 2>/dev/null)
printf '%s\n' "$found"
# At the begin of both attempts: the step, whether the weight is the first one, and for how many parameters there is a state.
[ "$(grep -E '^[0-9]+ (True|False)' <<<"$found" | paste -sd';')" = "0 True 0;0 False 2" ]
