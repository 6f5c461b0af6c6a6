"""Gradients of examples from a batch's own backward pass: those of passes with one example, in one pass."""

import contextlib
import warnings

import pytest
import torch
from example_models import IMAGES, TEXTS, classified, images, made, words
from torch import nn

from childtune_fast import estimate_fisher
from childtune_fast.fisher import by_example, rules
from childtune_fast.fisher.estimation import Estimation


def single(batches):
    return [
        {name: value[i : i + 1] for name, value in batch.items()}
        for batch in batches
        for i in range(len(next(iter(batch.values()))))
    ]


@contextlib.contextmanager
def passes(monkeypatch):
    """Counts the examples that have a pass of their own; a warning is an error."""
    taken = []
    whole = Estimation.whole
    monkeypatch.setattr(Estimation, "whole", lambda *args: taken.append(args) or whole(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield taken
    monkeypatch.setattr(Estimation, "whole", whole)


def assert_same(scores, expected, tolerance):
    largest = max(float(score.max()) for score in expected.values())
    for name, score in expected.items():
        bound = tolerance * max(float(score.max()), 1e-9 * largest)  # gradients that are nothing but rounding
        assert float((scores[name] - score).abs().max()) <= bound, name


def check(monkeypatch, model, batches, loss_fn=classified, tolerance=3e-7, **options):
    """The scores are float32, of float64 gradients: the sums of 10 squares round, and nothing else does."""
    options = {"loss_fn": loss_fn, "progress": False, **options}
    with passes(monkeypatch) as taken:
        scores = estimate_fisher(model, batches, per_example=True, **options)
    assert not taken
    expected = estimate_fisher(model, single(batches), **options)
    assert any(score.any() for score in expected.values())
    assert_same(scores, expected, tolerance)


@pytest.mark.parametrize("make", TEXTS.values(), ids=TEXTS)
def test_operations_on_texts(monkeypatch, make):
    batches = [words(), words(count=7, seed=1)]
    check(monkeypatch, made(make, batches[0]), batches)


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
def test_operations_on_images(monkeypatch, make):
    batches = [images(), images(count=4, seed=1)]
    check(monkeypatch, made(make, batches[0]), batches)


@pytest.mark.parametrize("options", [{"grad_clip": 0.05}, {"offload": "cpu"}, {"names": "inner|head"}])
def test_options(monkeypatch, options):
    batches = [words(), words(seed=1)]
    check(monkeypatch, made(TEXTS["encoder"], batches[0]), batches, **options)


def test_lengths_that_equal_other_sizes(monkeypatch):
    """The examples are told from other dimensions by their number in two batches, not by its value in this one."""
    batches = [words(), words(count=8, length=8, seed=1), words(count=7, length=7), words(count=16, length=3)]
    for kind in ("sequence first", "attention", "conv1d"):
        check(monkeypatch, made(TEXTS[kind], batches[0]), batches)


def config(transformers, kind, **more):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return getattr(transformers, f"{kind}Config")(vocab_size=40, **shape, **more)


def small_models(transformers):
    yield transformers.BertForSequenceClassification(config(transformers, "Bert")), "class"
    yield transformers.BertForMaskedLM(config(transformers, "Bert")), "words"  # tied embeddings
    yield transformers.AlbertForSequenceClassification(config(transformers, "Albert", embedding_size=8)), "class"
    yield transformers.LlamaForCausalLM(config(transformers, "Llama", num_key_value_heads=2)), "words"
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, pad_token_id=0, bos_token_id=1)
    gpt2.eos_token_id = 2
    yield transformers.GPT2ForSequenceClassification(gpt2), "class"
    t5 = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    t5.decoder_start_token_id = 0
    yield transformers.T5ForConditionalGeneration(t5), "words"


def test_transformers_models_with_padding(monkeypatch):
    """Each example's loss is the mean over its own words, of which a batch has more of one than of another."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    for model, labels in small_models(transformers):
        batches = []
        for count, length in ((5, 9), (4, 6), (3, 9)):
            ids, mask = torch.randint(5, 40, (count, length)), torch.ones(count, length, dtype=torch.long)
            for i in range(count):
                mask[i, length - i :] = 0
            of_words = ids.masked_fill(mask == 0, -100)
            batch = {"input_ids": ids, "attention_mask": mask}
            batches.append({**batch, "labels": of_words if labels == "words" else torch.arange(count) % 2})
        check(monkeypatch, model.double().eval(), batches, loss_fn=None)


def test_precision_of_float32(monkeypatch):
    """docs/numerics.md: less than 1e-5 of a tensor's highest score."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config(transformers, "Bert")).eval()
    ids = torch.randint(5, 40, (16, 24))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}
    scores = estimate_fisher(model, [batch], per_example=True, progress=False)
    expected = estimate_fisher(model.double(), single([batch]), progress=False)
    biases = [name for name in expected if name.endswith("key.bias")]  # 0 but for rounding, before a softmax
    for name, score in expected.items():
        if name not in biases:
            assert float((scores[name] - score).abs().max()) <= 1e-5 * float(score.max()), name


def test_dropout_is_drawn_for_each_example(monkeypatch):
    """All masks of a hundred equal examples together are the same as in passes of their own, on average."""
    model = Dropped().double()
    batch = {"x": torch.ones(600, 6, dtype=torch.float64), "y": torch.zeros(600, dtype=torch.long)}
    batch["x"] *= torch.linspace(0.9, 1.1, 600)[:, None]
    options = {"loss_fn": classified, "progress": False, "train_mode": True}
    with passes(monkeypatch) as taken:
        scores = estimate_fisher(model, [batch], per_example=True, **options)
    assert not taken
    expected = estimate_fisher(model, single([batch]), **options)
    for name, score in expected.items():
        torch.testing.assert_close(scores[name].mean(), score.mean(), rtol=0.1, atol=0)
    without = estimate_fisher(model, single([batch]), **{**options, "train_mode": False})
    assert float(without["1.weight"].mean()) < 0.8 * float(expected["1.weight"].mean())


class Dropped(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Dropout(0.5), nn.Linear(6, 3))


# ---- What is refused, and then done one example at a time ------------------------------------------------------------


def contrastive(model, batch):
    vectors = nn.functional.normalize(model(batch["x"]), dim=1)
    return nn.functional.cross_entropy(vectors @ vectors.T, torch.arange(len(vectors))) + vectors.square().mean(0)[0]


class Centered(nn.Module):
    """Its output for an example depends on the others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden - 0.5 * hidden.mean(0, keepdim=True))


class Routed(nn.Module):
    """Words go through one of two experts, as many as have a sign."""

    def __init__(self):
        super().__init__()
        self.experts, self.last = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 3)

    def forward(self, x):
        output, high = torch.zeros_like(x), x[:, 0] > 0
        output = output.index_put((high,), self.experts[0](x[high]))
        return self.last(output.index_put((~high,), self.experts[1](x[~high])))


def rows(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 6, generator=generator, dtype=torch.float64),
        "y": torch.randint(3, (count,), generator=generator),
    }


@pytest.mark.parametrize("make", [Centered, Routed])
@pytest.mark.filterwarnings("ignore:.*since torch.func.vmap cannot run this model")
def test_what_cannot_be_taken_apart(make):
    torch.manual_seed(0)
    model, batches = make().double(), [rows(), rows(seed=1)]
    options = {"loss_fn": classified, "progress": False}
    with pytest.warns(UserWarning, match="slower way, since the backward pass of a batch cannot be") as told:
        scores = estimate_fisher(model, batches, per_example=True, **options)
    slower = [warning for warning in told if "slower way" in str(warning.message)]
    assert [warning.filename for warning in slower] == [__file__]
    assert_same(scores, estimate_fisher(model, single(batches), **options), 1e-6)


@pytest.mark.filterwarnings("ignore:.*since torch.func.vmap cannot run this model")
def test_batch_normalization_in_training_mode():
    """An example alone is normalized by its own places, and in a batch by those of all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    batches = [{"x": rows(count=4)["x"].repeat(1, 2).view(4, 2, 6), "y": rows(count=4)["y"]}]
    options = {"loss_fn": classified, "progress": False, "train_mode": True}
    with pytest.warns(UserWarning, match="slower way"):
        scores = estimate_fisher(model, batches, per_example=True, **options)
    assert_same(scores, estimate_fisher(model, single(batches), **options), 1e-6)


def test_a_loss_that_compares_examples_is_that_of_one(monkeypatch):
    """The loss of an example is that of a batch with this example alone, which has none to compare it with."""
    torch.manual_seed(0)
    check(monkeypatch, nn.Sequential(nn.Linear(6, 4)).double(), [rows(), rows(seed=1)], loss_fn=contrastive)


def test_a_wrong_rule_is_found(monkeypatch):
    right = rules._RULES["AddmmBackward", 2]

    def wrong(place, grad):
        of = right(place, grad)
        return lambda begin, end: [gradient * 1.001 for gradient in of(begin, end)]

    monkeypatch.setitem(rules._RULES, ("AddmmBackward", 2), wrong)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.warns(UserWarning, match=r"the gradients of '\d.weight' are not those of the examples alone"):
        scores = estimate_fisher(model, [rows()], per_example=True, loss_fn=classified, progress=False)
    assert_same(scores, estimate_fisher(model, single([rows()]), loss_fn=classified, progress=False), 1e-6)


def test_nothing_is_left_behind():
    torch.manual_seed(0)
    model = made(TEXTS["encoder"], words())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    estimate_fisher(model, [words()], per_example=True, loss_fn=classified, progress=False, train_mode=True)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(param.grad is None and not param._post_accumulate_grad_hooks for param in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_is_taken_in_parts_where_much_would_wait(monkeypatch):
    """A table that is used again at the end waits for its first use, and with it what it is computed from."""
    taken = []
    part = by_example.ByExample.part

    def noted(self, begin, end, loss):
        found = part(self, begin, end, loss)
        taken.append((begin, found.examples if found else None))
        return found

    monkeypatch.setattr(by_example.ByExample, "part", noted)
    model = made(TEXTS["used twice"], words())
    check(monkeypatch, model, [words(count=9)])
    assert taken == [(0, 9)]
    taken.clear()
    # Weight and bias have two uses each, at which two tensors are counted: half of that is four examples'.
    monkeypatch.setattr(by_example, "_MOST_HELD", 8 * (9 * 7 * 8 * 8) // 2)
    scores = estimate_fisher(model, [words(count=9)], per_example=True, loss_fn=classified, progress=False)
    assert_same(scores, estimate_fisher(model, single([words(count=9)]), loss_fn=classified, progress=False), 3e-7)
    assert taken == [(0, 4), (4, 4)]  # the last example has a pass of its own
