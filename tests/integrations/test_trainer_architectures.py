"""ChildTuningTrainer with the architectures and tasks that Child-Tuning is for, with both modes."""

import pytest
import torch
from helpers import same_bits
from trainer_runs import BOTH, CLASSES, make_data, make_model, make_trainer, weights

SEQUENCE, TOKENS = "SequenceClassification", "TokenClassification"
# The head, and what its configuration needs, for each task.
TASKS = {
    "classes": (SEQUENCE, {"num_labels": CLASSES}),
    "regression": (SEQUENCE, {"num_labels": 1, "problem_type": "regression"}),
    "multi-label": (SEQUENCE, {"num_labels": CLASSES, "problem_type": "multi_label_classification"}),
    "tokens": (TOKENS, {"num_labels": CLASSES}),
    "causal LM": (None, {}),
    "seq2seq": (None, {"decoder_start_token_id": 0}),
}
ENCODERS = ("BERT", "RoBERTa", "ELECTRA", "XLNet")
CASES = [
    *[(name, task) for name in ENCODERS for task in ("classes", "regression", "multi-label", "tokens")],
    *[(name, task) for name in ("GPT-2", "LLaMA") for task in ("causal LM", "classes", "regression", "tokens")],
    ("T5", "seq2seq"),
    ("T5", "tokens"),
]


@pytest.mark.parametrize(("name", "task"), CASES, ids=[f"{name}, {task}" for name, task in CASES])
@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_it_trains(tmp_path, config, name, task):
    head, options = TASKS[task]
    model = make_model(name, head=head, pad_token_id=0, **{"num_labels": 2, **options})
    before = weights(model)
    trainer = make_trainer(tmp_path, config, model=model, data=make_data(task), arguments_={"num_train_epochs": 1})
    losses = trainer.train().training_loss
    assert losses > 0
    masks = {} if config.mode == "F" else trainer.child_network.masks()
    assert bool(masks) == (config.mode == "D")
    moved = 0
    for parameter, param in model.named_parameters():
        assert torch.isfinite(param).all()
        mask = masks.get(parameter)
        if mask is not None:
            assert same_bits(param[~mask], before[parameter][~mask]), parameter
        moved += (param != before[parameter]).sum().item()
    trained = sum(p.numel() if masks.get(n) is None else masks[n].sum().item() for n, p in model.named_parameters())
    assert 0.5 * trained < moved <= trained  # some rows of an embedding, and the keys' biases, have no gradient
