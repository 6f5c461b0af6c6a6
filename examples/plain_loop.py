"""Child-Tuning in a plain PyTorch loop: `python -m examples.plain_loop`, or with `--mode D`. Needs no network."""

import argparse

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.finetune import data, model
from childtune_fast import ChildAdamW, ChildNetwork, estimate_fisher

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--mode", choices=["F", "D"], default="F")
parser.add_argument("--task", default="docstrings", help="docstrings (default), or a TSV file: sentence1, label")
parser.add_argument("--limit", type=int, default=800, help="examples in train, and in dev (default: %(default)s)")
options = parser.parse_args()

torch.manual_seed(0)
task, folder = data.load_task(options.task, limit=options.limit, dev_limit=options.limit), model.packaged_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels))


def collate(examples):
    """Returns a batch of the model's inputs, `labels` among them."""
    texts = [example.sentence1 for example in examples]
    batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor(task.targets(examples))}


batches = torch.utils.data.DataLoader(task.train, batch_size=16, shuffle=True, collate_fn=collate)
if options.mode == "F":
    optimizer = ChildAdamW(network.parameters(), lr=5e-4, reserve_p=0.3)
else:
    child = ChildNetwork.from_scores(network, estimate_fisher(network, batches), reserve_p=0.3)
    optimizer = ChildAdamW(network.parameters(), lr=5e-4, child=child)

network.train()
for batch in batches:
    loss = network(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

network.eval()
right = 0
with torch.no_grad():
    for batch in torch.utils.data.DataLoader(task.dev, batch_size=16, collate_fn=collate):
        right += (network(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
print(f"accuracy {right / len(task.dev):.3f}")
