#!/usr/bin/env bash
# Lightning refuses to clip the gradients of a fused optimizer in bfloat16, where nothing is ever scaled.
#
# One would assume: AdamW(fused=True) and gradient_clip_val= go together unless a GradScaler has to unscale gradients before
#   they are clipped, so in "32-true" and in "bf16-mixed", which has no scaler, but not in "16-mixed".
# What happens: the plug-in for both mixed precisions asks the optimizer for _step_supports_amp_scaling, by which torch says
#   that its fused step can take a scale, and raises in both, for "it performs unscaling of gradients internally". So code
#   that trains with gradient_clip_val= in float32 fails when precision="bf16-mixed" is added.
# Versions: lightning 2.6.6, torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy lightning==2.6.6 2>/dev/null
cat >"$folder/clip.py" <<'PY'
import logging
import sys
import warnings

import lightning
import torch

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self, fused):
        super().__init__()
        self.layer, self.fused = torch.nn.Linear(3, 2), fused

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=self.fused)


for precision in ("32-true", "bf16-mixed"):
    for fused in (False, True):
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", precision=precision, gradient_clip_val=1.0, enable_model_summary=False, **options
        )
        try:
            trainer.fit(Module(fused), torch.utils.data.DataLoader(torch.ones(4, 3)))
            print(precision, fused, "trained", file=sys.stderr)
        except RuntimeError as error:
            print(precision, fused, "refused" if "unscaling of gradients" in str(error) else error, file=sys.stderr)
PY
found=$("$folder/env/bin/python" "$folder/clip.py" 2>&1 >/dev/null | grep -E 'trained$|refused$' | paste -sd';')
printf 'precision, fused, outcome: %s\n' "$found"
[ "$found" = "32-true False trained;32-true True trained;bf16-mixed False trained;bf16-mixed True refused" ]
