"""Helpers of the trainer's tests: tiny models for every task, data for them, and short runs."""

import copy
import random

import numpy as np
import torch
from models import family
from transformers import TrainerCallback, TrainingArguments

from childtune_fast.integrations.transformers import ChildTuningConfig, ChildTuningTrainer

LENGTH, EXAMPLES, CLASSES = 8, 12, 3
F = ChildTuningConfig(mode="F")
D = ChildTuningConfig(mode="D")
BOTH = {"F": F, "D": D}
REFRESHED = ChildTuningConfig(mode="D", refresh_every="epoch")
BEST_IS_SECOND = (0, 2, 1)  # the metric after each of three epochs


def labels_of(task, tokens, generator):
    """Labels that a model can learn, or at least take."""
    if task == "regression":
        return torch.rand((), generator=generator).item()
    if task == "multi-label":
        return torch.randint(2, (CLASSES,), generator=generator).float().tolist()
    if task == "tokens":
        return [-100, *(token % CLASSES for token in tokens[1:])]
    return tokens if task in ("causal LM", "seq2seq") else tokens[0] % CLASSES


def make_data(task="classes", examples=EXAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(examples):
        tokens = torch.randint(3, 40, (LENGTH,), generator=generator).tolist()
        data.append({"input_ids": tokens, "labels": labels_of(task, tokens, generator)})
    return data


def make_model(name="BERT", seed=0, **options):
    """A model with the dropout of its family, the same for the same seed."""
    torch.manual_seed(seed)
    return family(name, **{"num_labels": CLASSES, **options})[0]


def arguments(folder, kind=TrainingArguments, **options):
    """Three batches, so three steps, in an epoch; two epochs; warm-up, decay and clipping at work."""
    return kind(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "max_grad_norm": 0.5,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        }
    )


def make_trainer(folder, config=D, model=None, data=None, trainer=ChildTuningTrainer, arguments_=None, **options):
    """A trainer that has not begun; `config` None is for classes without Child-Tuning."""
    if config is not None:
        options["child_tuning"] = config
    if "model_init" not in options:
        options["model"] = make_model() if model is None else model
    return trainer(
        args=arguments(folder, **(arguments_ or {})),
        train_dataset=make_data() if data is None else data,
        **options,
    )


class Recorder(TrainerCallback):
    """Notes what every step begins with: learning rates, gradients as clipped, and the random states."""

    def __init__(self):
        self.rates, self.grads, self.random = [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.random.append((torch.get_rng_state(), str(np.random.get_state()), random.getstate()))  # noqa: NPY002

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def optimizer_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def states_of(trainer):
    """What the optimizer holds, copied."""
    return copy.deepcopy(optimizer_of(trainer).state_dict())


class Moments(TrainerCallback):
    """Notes weights, child network and optimizer at the end of each epoch, and saves the model at the very end."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.children, self.states = trainer, [], [], []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.weights.append(weights(self.trainer.model))
        self.children.append(self.trainer.child_network)
        self.states.append(states_of(self.trainer))

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.save_model(f"{args.output_dir}/at the end")


def make_best(folder, config=REFRESHED, metrics=BEST_IS_SECOND, model=None, trainer=ChildTuningTrainer, **options):
    """A trainer of three epochs of three steps, of which each has the given metric, and its notes."""
    to_come = iter(metrics)
    trainer = make_trainer(
        folder,
        config,
        model=model,
        trainer=trainer,
        eval_dataset=make_data(examples=4, seed=1),
        compute_metrics=lambda _: {"score": next(to_come)},
        arguments_={
            "num_train_epochs": 3,
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": True,
            **options,
        },
    )
    notes = Moments(trainer)
    trainer.add_callback(notes)
    return trainer, notes
