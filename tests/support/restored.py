"""Helpers of the tests that weights come back: what they were, and a model whose forward pass writes them."""

import torch
from fisher_models import make_model
from helpers import same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint


def bits_of(model):
    return {name: (param, param.data_ptr(), param.detach().clone()) for name, param in model.named_parameters()}


def assert_same_weights(model, before):
    after = dict(model.named_parameters())
    assert list(after) == list(before)  # in the same order, too
    for name, (param, address, values) in before.items():
        assert after[name] is param
        assert param.data_ptr() == address
        assert same_bits(param.detach(), values)


class Tokens(nn.Module):
    """Whose table's rows are longer than they may be, so that a lookup changes them."""

    def __init__(self, table=nn.Embedding, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = table(9, 6, max_norm=0.5)
        self.rest = make_model()
        self.checkpointed = checkpointed

    def forward(self, x):
        ids = x.abs().long().clamp(max=8)
        if isinstance(self.table, nn.EmbeddingBag):
            return self.rest(self.table(ids))
        looked_up = checkpoint(self.table, ids, use_reentrant=False) if self.checkpointed else self.table(ids)
        return self.rest(looked_up.mean(1))
