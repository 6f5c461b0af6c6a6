#!/usr/bin/env bash
# Trainer multiplies the gradients of BERT's heads by the number of batches that it accumulates, and of processes.
#
# One would assume: gradient_accumulation_steps=4 with batches of 4 trains with the gradient of one batch of 16, so that
#   clipping, epsilon and logged losses mean the same; and so do two processes with half of the batch each.
# What happens: Trainer divides the loss by the number of accumulated batches only if the model's forward takes no **kwargs.
#   If it does, as most of transformers' do, Trainer passes num_items_in_batch and trusts the model to divide by it; and it
#   multiplies the loss by the number of processes, over which the items are counted. A causal language model divides.
#   BertForSequenceClassification drops it, as BERT's other heads but the causal one do, and LlamaForSequenceClassification,
#   and returns the mean of its batch. So the gradient is k times as large for a window of k batches, less in an epoch's
#   last window if that is shorter, and n times as large on n processes. With max_grad_norm, clipping sets in k n times
#   earlier. Adam's steps hide the rest.
# Versions: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 2>/dev/null
cat >"$folder/accumulate.py" <<'PY'
import os
import sys

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

transformers.logging.set_verbosity_error()
SIZES = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
generator = torch.Generator().manual_seed(0)
TOKENS = torch.randint(1, 50, (16, 8), generator=generator)


class Plain(torch.nn.Module):  # a model whose forward takes no **kwargs
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 2)

    def forward(self, input_ids, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.layer(input_ids.float() / 50), labels)}


def make(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0))
    return LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "causal" else Plain()


def gradients(kind, examples, size, accumulated):
    found = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **others):
            found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *others):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        sys.argv[1], use_cpu=True, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
        num_train_epochs=1, learning_rate=0.0, max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    data = [
        {"input_ids": TOKENS[i], "labels": TOKENS[i] if kind == "causal" else torch.tensor(i % 3 % 2)} for i in examples
    ]
    InOrder(model=make(kind), args=args, train_dataset=data, callbacks=[Look()]).train()
    return found


def times(gradient, of):
    """The number of which a gradient is that multiple of another one."""
    factor = float(gradient @ of / (of @ of))
    assert (gradient - factor * of).norm() < 1e-4 * gradient.norm(), "no multiple"
    return f"{factor:.2f}"


if len(sys.argv) == 3:  # the gradient of 16 examples, for the other call
    of = torch.load(sys.argv[2])
    (gradient,) = gradients("bert", range(16), 8, 1)  # on two processes
    if os.environ["RANK"] == "0":
        print(f"bert, 2 processes: {times(gradient, of)}")
else:
    for kind in ("bert", "llama", "causal", "plain"):
        (of,) = gradients(kind, range(16), 16, 1)
        (gradient,) = gradients(kind, range(16), 4, 4)
        print(f"{kind}, 4 batches: {times(gradient, of)}")
    last = gradients("bert", range(12), 2, 4)[-1]  # windows of 4 and 2 batches
    print(f"bert, last 2 batches: {times(last, gradients('bert', range(8, 12), 4, 1)[0])}")
    torch.save(gradients("bert", range(16), 16, 1)[0], f"{sys.argv[1]}/gradient.pt")
PY
found=$("$folder/env/bin/python" "$folder/accumulate.py" "$folder" 2>/dev/null | grep '^[a-z]*, ')
found+=$'\n'$("$folder/env/bin/torchrun" --nproc-per-node 2 --master-port 29583 "$folder/accumulate.py" "$folder" "$folder/gradient.pt" \
  2>/dev/null | grep '^[a-z]*, ')
printf '%s\n' "$found"
[ "$found" = "bert, 4 batches: 4.00
llama, 4 batches: 4.00
causal, 4 batches: 1.00
plain, 4 batches: 1.00
bert, last 2 batches: 2.00
bert, 2 processes: 2.00" ]
