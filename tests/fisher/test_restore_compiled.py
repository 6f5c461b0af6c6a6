"""estimate_fisher neither writes the weights of what torch.compile made nor undoes the compilation."""

import pytest
import torch
from fisher_models import estimate, make_batches
from restored import Tokens, assert_same_weights, bits_of
from torch.nn import functional


@pytest.mark.parametrize("what", ["the model", "a function", "the model, in place"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch looks for when it compiles
def test_what_torch_compile_made_stays_compiled(what):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = Tokens()
    before = bits_of(model)
    act = torch.compile(torch.sin, backend=backend) if what == "a function" else torch.sin
    if what == "the model, in place":
        model.compile(backend=backend)
    run = torch.compile(model, backend=backend) if what == "the model" else model

    def loss(run, batch):
        return functional.cross_entropy(act(run(batch["x"])), batch["y"][0])

    scores = estimate(run, make_batches(), loss_fn=loss)
    assert_same_weights(model, before)
    assert all(score.any() for score in scores.values())
    assert len(graphs) == 1
    estimate(run, make_batches(), loss_fn=loss)
    loss(run, make_batches()[0])
    loss(run.eval(), make_batches()[0])
    loss(run.train(), make_batches()[0])
    assert len(graphs) == (1 if what == "a function" else 2)  # for evaluation and for training
