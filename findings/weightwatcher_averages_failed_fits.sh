#!/usr/bin/env bash
# weightwatcher calls a layer whose fit has failed over-trained, and averages its alpha of -1.
#
# One would assume: get_summary() averages the layers that were fitted, and a layer with the status "failed" has no warning
#   about its training.
# What happens: a failed fit leaves alpha at -1. That is below 2, so the warning is "over-trained"; and get_summary() takes
#   the mean of the whole column. A layer of zeros, which the second factor of a fresh LoRA is, makes a model of layers with
#   alphas above 6, "under-trained", one with a mean between 2 and 6, as well-trained models have. Its log_norm is -inf, and
#   so is the mean. A layer with equal eigenvalues, such as the identity, has an alpha of inf, and counts as a success.
# Versions: weightwatcher 0.7.7, torch 2.13.0 (CPU). Seen on 2026-11-29.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy weightwatcher==0.7.7 2>/dev/null
cat >"$folder/summary.py" <<'PY'
import torch
import weightwatcher


def show(title, *layers):
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(*layers))
    details = watcher.analyze()
    summary = watcher.get_summary()
    last = details.iloc[-1]
    print(f"{title}: {last.alpha:.2f} {last.status} {last.warning}; means {summary['alpha']:.2f} {summary['log_norm']:.2f}")


torch.manual_seed(0)
random = [torch.nn.Linear(100, 100) for _ in range(2)]
zeros, identity = torch.nn.Linear(100, 100), torch.nn.Linear(100, 100)
torch.nn.init.zeros_(zeros.weight)
torch.nn.init.eye_(identity.weight)
show("random", *random)
show("zeros last", *random, zeros)
show("identity last", *random, identity)
PY
found=$(CUDA_VISIBLE_DEVICES='' "$folder/env/bin/python" "$folder/summary.py" 2>/dev/null | grep means)
printf 'alpha, status and warning of the last layer; means of alpha and log_norm\n%s\n' "$found"
[ "$found" = "random: 6.70 success under-trained; means 6.77 1.52
zeros last: -1.00 failed over-trained; means 4.18 -inf
identity last: inf success under-trained; means inf 1.68" ]
