"""docs/fisher.md: its code runs, in its order, and what it says of gradient accumulation is so."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")  # which trainer_runs and models need

from models import family
from trainer_runs import D, make_data, make_model, make_trainer
from transformers import Trainer, TrainerCallback

from childtune_fast import FisherAccumulator, estimate_fisher
from childtune_fast.integrations import scores

DOCS = Path(__file__).parents[2] / "docs" / "fisher.md"
BATCHES, SIZE = 66, 4  # the page compares the first 64 batches with the next ones
ACCUMULATED = {"gradient_accumulation_steps": 3}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it


def codes():
    return re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def batches(count=BATCHES):
    rows = make_data(examples=count * SIZE)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    return [{key: values[i : i + SIZE] for key, values in batch.items()} for i in range(0, count * SIZE, SIZE)]


def lora_model():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        family("BERT", num_labels=3)[0], peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    )


def assert_close(found, expected):
    """Gradients in float32; where they are 0 but for rounding, as of attention's key biases, so are both."""
    highest = max(float(of.max()) for of in expected.values())
    for name, of in expected.items():
        torch.testing.assert_close(found[name], of, rtol=1e-3, atol=1e-6 * highest)


def test_the_code_of_the_page_runs(capsys):
    names = {"model": make_model(), "dataloader": batches(), "lora_model": lora_model()}
    for code in codes():
        exec(code, names)
    assert re.fullmatch(r"\d+% of the weights are in both, by chance 30 %\n", capsys.readouterr().out)
    assert names["scores"].keys() == dict(names["model"].named_parameters()).keys()
    assert not any("lora" in name for name, _ in names["merged"].named_parameters())


def test_windows_of_batches_score_as_large_batches():
    """The accumulator's recipe; the model is compared in evaluation mode, since dropout differs between the two."""
    (code,) = (code for code in codes() if "fisher.update()" in code)
    names = {"model": make_model().eval(), "dataloader": batches(8)}
    exec(codes()[0], names)
    exec(code, names)
    windows = (names["dataloader"][:4], names["dataloader"][4:])
    large = [{key: torch.cat([batch[key] for batch in window]) for key in window[0]} for window in windows]
    assert_close(names["fisher"].scores(), estimate_fisher(names["model"], large, progress=False))


def test_accumulation_does_not_change_the_scores_of_a_trainer(tmp_path):
    """Not even those of a model whose gradients Trainer makes larger, as the next test shows."""
    usual, accumulated = (
        scores.fisher_scores(make_trainer(tmp_path, arguments_=options), D, 0) for options in ({}, ACCUMULATED)
    )
    assert all(torch.equal(accumulated[name], of) for name, of in usual.items())


def test_what_trainer_accumulates_has_a_common_factor(tmp_path):
    """Windows of three batches: gradients of BERT are three times the mean, so the squares nine times."""
    found = {}

    def squares(model, factor, **options):
        fisher = FisherAccumulator(model)

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **others):
                fisher.update()

        size = {"max_grad_norm": 0.0, "num_train_epochs": 1, **options}
        make_trainer(tmp_path, None, model=model, trainer=Trainer, arguments_=size, callbacks=[Look()]).train()
        found[factor] = fisher.scores()

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    squares(make_model(**still), 1, per_device_train_batch_size=12)
    squares(make_model(**still), 9, **ACCUMULATED)
    assert_close(found[9], {name: 9 * of for name, of in found[1].items()})
