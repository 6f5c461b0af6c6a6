"""Gradients of examples from one backward pass of the batch: losses, batches and memory for which that is right."""

import by_example_helpers as helpers
import pytest
import torch
from by_example_helpers import HIDDEN, WIDTH, Model, batch, check_scores, plain, random
from test_estimate_memory import peak_allocation
from torch import nn
from torch.nn import functional as F

from childtune_fast import estimate_fisher
from childtune_fast.fisher import by_example

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- Losses --------------------------------------------------------------------------------------------------------


def token_loss(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def selecting_loss(model, batch):
    logits, used = model(batch["x"]), batch["y"] != -100
    return F.cross_entropy(logits[used], batch["y"][used])


@pytest.mark.parametrize("loss", [token_loss, selecting_loss])
def test_a_loss_that_divides_by_the_number_of_labels(loss):
    labels = torch.randint(3, (8, 5))
    labels[::2, 2:] = -100
    labels[1, 0] = -100
    check_scores(Model(lambda s, x: s.h(s.a(x).tanh())), [{**batch(), "y": labels}], loss)


def test_a_loss_that_compares_examples_is_taken_of_one_example():
    """That of an in-batch contrastive loss alone is constant; what else is in the loss counts."""

    def loss(model, batch):
        z = model(batch["x"])
        return F.cross_entropy(z @ z.T, torch.arange(len(z))) + z.pow(2).mean()

    check_scores(plain(), [batch()], loss)


def test_an_auxiliary_loss():
    def function(s, x):
        gates = s.r(x).softmax(-1)
        hidden = torch.einsum("btd,edh,bte->bth", x, s.e, gates)
        return s.h(hidden.tanh().mean(1)), gates

    def loss(model, batch):
        logits, gates = model(batch["x"])
        return F.cross_entropy(logits, batch["y"]) + 1e-3 * gates.mean((0, 1)).pow(2).sum()

    check_scores(Model(function, r=nn.Linear(WIDTH, 2), e=random(2, WIDTH, HIDDEN)), [batch(), batch(5)], loss)


def test_parameters_that_the_loss_uses_itself():
    def loss(model, batch):
        return F.cross_entropy(F.linear(model(batch["x"]) * model.t, model.u.weight), batch["y"])

    check_scores(plain(t=random(3), u=nn.Linear(3, 3)), [batch(), batch(4)], loss)


def test_two_calls_with_different_lengths():
    def loss(model, batch):
        return F.mse_loss(F.cosine_similarity(model(batch["x"]), model(batch["z"])), batch["y"])

    batches = [{"x": batch(n)["x"], "z": batch(n, 7)["x"], "y": torch.rand(n)} for n in (8, 4)]
    check_scores(plain(), batches, loss)


def test_a_number_of_calls_that_changes():
    def loss(model, batch):
        return sum(helpers.loss_of(model, batch) for _ in range(1 + batch["x"].shape[1] % 2))

    check_scores(plain(), [batch(8, 4), batch(8, 5), batch(8, 4)], loss)


def test_outputs_of_any_nesting():
    def inner(s, x):
        hidden = s.l(x).tanh()
        return hidden, None, [hidden[:, 0], "text"], {"sum": (hidden.sum(1), 3)}

    def outer(s, x):
        out = s.body(x)
        return s.h(out[0].mean(1) + out[2][0] + out[3]["sum"][0])

    check_scores(Model(outer, body=Model(inner, l=nn.Linear(WIDTH, HIDDEN))), [batch(), batch(4)])


def test_random_numbers_in_evaluation_mode():
    """Numbers too small to matter, since each pass draws others."""
    check_scores(Model(lambda s, x: s.h(s.a(x + 1e-12 * torch.randn_like(x)).mean(1))), [batch(), batch(4)])


def test_dropout():
    """It drops nothing here, but draws masks, so that the trial must make them equal."""
    model = Model(lambda s, x: s.h(s.d(s.a(s.d(x)).tanh()).mean(1)), d=nn.Dropout(1e-12))
    check_scores(model, [batch(), batch(4)], train_mode=True)


def test_dropout_drops():
    """With half of the elements dropped, the mean score of many passes is that of single passes."""
    model = Model(lambda s, x: s.h(s.d(s.a(x)).mean(1)), d=nn.Dropout(0.5))
    batches = [batch()] * 200
    options = {"loss_fn": helpers.loss_of, "train_mode": True, "progress": False, "names": "^a"}
    found = estimate_fisher(model, batches, per_example=True, **options)
    expected = estimate_fisher(model, helpers.singles(batches), **options)
    without = estimate_fisher(model, batches, per_example=True, **{**options, "train_mode": False})
    for name, score in expected.items():
        assert abs(found[name].sum() / score.sum() - 1) < 0.05
        assert abs(without[name].sum() / score.sum() - 1) > 0.1


# ---- Batches -------------------------------------------------------------------------------------------------------


def positions(s, x):
    """Sequence first, and with sizes that may be equal."""
    x = x.transpose(0, 1) + s.p(torch.arange(x.shape[1]))[:, None]
    return s.h(s.a(x).tanh().mean(0))


@pytest.mark.parametrize("function", [positions, lambda s, x: s.h(s.a(x).tanh().mean(1))], ids=["sequence first", ""])
def test_batches_of_many_shapes(function):
    """Sizes equal to the number of examples, to a layer's width, to 1; and batches of one or two examples."""
    shapes = [(8, 5), (8, 8), (5, 5), (2, 5), (1, 5), (3, 3), (6, 1), (8, WIDTH), (WIDTH, WIDTH), (3, 2)]
    model = Model(function, p=nn.Embedding(9, WIDTH))
    _, taken = check_scores(model, [batch(*shape) for shape in shapes], names="a|h|p")
    assert taken == [size for size, _ in shapes if size > 2]


@pytest.mark.parametrize("first", [1, 3])
def test_a_first_batch_of_length_1_proves_nothing_for_others(first):
    """The module's output has the examples side by side in batches of length 1 alone."""

    def inner(s, x):
        return s.l(x.transpose(0, 1).reshape(-1, WIDTH)).tanh()

    def outer(s, x):
        return s.h(s.body(x).view(x.shape[1], x.shape[0], HIDDEN).mean(0))

    model = Model(outer, body=Model(inner, l=nn.Linear(WIDTH, HIDDEN)))
    batches = [batch(8, first), batch(8, 4), batch(4, 4)]
    check_scores(model, batches, names="body|h", refused="not those of the examples alone")


@pytest.mark.parametrize("same", ["equal examples", "losses of 0"])
def test_examples_that_prove_nothing(same):
    """The first batch is left to single passes, and the second one shows that the model mixes examples."""
    first = batch()
    first["w"] = torch.full((8,), float(same != "losses of 0"))
    if same == "equal examples":
        first = {name: tensor[:1].expand_as(tensor).clone() for name, tensor in first.items()}
    model = Model(lambda s, x: (lambda z: s.h(z + 0.5 * z.roll(1, 0)))(s.a(x).tanh().mean(1)))

    def loss(model, batch):
        return (F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * batch["w"]).mean()

    check_scores(model, [first, {**batch(), "w": torch.ones(8)}], loss, refused="not those of the examples alone")


def test_another_branch_for_a_whole_batch():
    def function(s, x):
        hidden = s.a(x)
        return s.h((hidden.tanh() if x[0, 0, 0] < 3 else hidden.sigmoid()).mean(1))

    batches = [batch(), batch(), batch()]
    batches[1]["x"][:, 0, 0] = 5
    check_scores(Model(function), batches)


def test_few_parameters_and_frozen_ones():
    model = plain(ln=nn.LayerNorm(WIDTH))
    check_scores(model, [batch()], names="a.weight")
    check_scores(model, [batch()], names="h.bias")
    model.a.weight.requires_grad_(False)
    check_scores(model, [batch()])


@pytest.mark.parametrize("options", [{"grad_clip": 0.05}, {"offload": "cpu"}, {"offload": "cpu", "grad_clip": 0.05}])
def test_options(options):
    model = Model(lambda s, x: s.h(s.a(s.e(x)).tanh().mean(1)), e=nn.Embedding(20, WIDTH))
    check_scores(model, [helpers.token_batch(), helpers.token_batch(5)], **options)


# ---- Memory --------------------------------------------------------------------------------------------------------


def looped(layers=3):
    def function(s, x):
        x = s.a(x)
        for _ in range(layers):
            x = s.r(x).tanh()
        return s.h(x.mean(1))

    return Model(function, r=nn.Linear(HIDDEN, HIDDEN))


def test_parts_of_a_batch(monkeypatch):
    """A batch whose shared layer holds more than the limit goes in parts; one example alone goes by itself."""
    _, whole = check_scores(looped(), [batch(), batch(7)])
    assert whole == [8, 7]
    one = (
        3 * 4 * (2 * 5 * HIDDEN + HIDDEN)
    )  # bytes that the three uses of the layer hold of an example: weight and bias
    monkeypatch.setattr(by_example, "_MOST_HELD", 4 * one)
    _, parts = check_scores(looped(), [batch(), batch(7)])
    assert parts == [4, 4, 3, 3]
    monkeypatch.setattr(by_example, "_MOST_HELD", 0)
    monkeypatch.setattr(by_example.ByExample, "finish", None)
    assert estimate_fisher(looped(), [batch()], loss_fn=helpers.loss_of, per_example=True, progress=False)


def test_a_part_that_is_refused_after_another_one(monkeypatch):
    """What has been added counts once."""

    def function(s, x):
        hidden = s.r(s.r(s.a(x)).tanh())
        return s.h((hidden.sigmoid() if len(x) < 8 and x[0, 0, 0] > 3 else hidden.tanh()).mean(1))

    first, second = batch(), batch()
    second["x"][4, 0, 0] = 5
    monkeypatch.setattr(by_example, "_MOST_HELD", 4 * 2 * 4 * (2 * 5 * HIDDEN + HIDDEN))
    _, taken = check_scores(Model(function, r=nn.Linear(8, 8)), [first, second], refused="examples alone")
    assert taken == [4, 4, 4]


MEBI = 2**20


@pytest.mark.parametrize("kind", ["tied embeddings", "an operation without a rule", "a layer in a loop"])
def test_at_most_256_mebibytes_more_than_a_backward_pass(monkeypatch, kind):
    """Here it is a 32nd of that, with a model, and waves for the trial, that are smaller by as much."""
    limit = 8 * MEBI
    monkeypatch.setattr("childtune_fast.fisher.sketch._CHUNK", 2**15)
    monkeypatch.setattr(by_example, "_MOST_HELD", limit)
    if kind == "tied embeddings":
        head = nn.Linear(64, 5000, bias=False)
        model = Model(lambda s, x: s.o(s.e(x)), e=nn.Embedding(5000, 64), o=head)
        head.weight = model.e.weight
        data = {"x": torch.randint(5000, (16, 32)), "y": torch.randint(5000, (16, 32))}
        loss = token_loss
    elif kind == "an operation without a rule":
        model = Model(lambda s, x: s.h(s.r(x)[0][:, -1, :HIDDEN]), r=nn.LSTM(WIDTH, 256, batch_first=True))
        data, loss = batch(32, 5), helpers.loss_of
    else:
        model, loss = looped(40), helpers.loss_of
        data = batch(16, 2000)
    scores = sum(4 * param.numel() for param in model.parameters())

    def estimated():
        return estimate_fisher(model, [data], loss_fn=loss, per_example=True, progress=False, names="e|r|o")

    one_backward = peak_allocation(lambda: loss(model, data).backward())
    model.zero_grad()
    peak = peak_allocation(estimated)
    assert peak <= one_backward + scores + limit
