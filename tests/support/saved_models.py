"""Models of transformers in folders: a base without a head, and what Child-Tuning_D makes of it."""

import torch
from models import family, random_scores
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from childtune_fast import ChildAdamW, ChildNetwork


def save_base(folder, dtype=torch.float32, **options):
    """Writes BERT without a head, and a tokenizer of the words w3 to w39; returns the folder's name."""
    torch.manual_seed(0)
    family("BERT", **options)[0].bert.to(dtype).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, **{f"w{i}": i for i in range(3, 40)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def load(folder, seed=1, num_labels=3, **options):
    """The base with a new head."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels, **options)


def tuned(folder, seed=1, child=None, **options):
    """The base after three steps of Child-Tuning_D, and its child network: chosen here, or in a file."""
    model = load(folder, seed, **options)
    if child is None:
        child = ChildNetwork.from_scores(model, random_scores(model, seed), reserve_p=0.3)
    else:
        child = ChildNetwork.load(child, model)
    optimizer = ChildAdamW(model.parameters(), lr=1e-2, child=child)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        tokens = torch.randint(3, 40, (4, 8), generator=generator)
        model(input_ids=tokens, labels=tokens[:, 0] % model.config.num_labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), child


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name
