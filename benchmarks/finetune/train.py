"""The one training loop that all methods share, and what they do before it.

Everything but the optimizer is equal by construction: one loop, one warm-up and decay of the learning rate, one split
into weights that decay and weights that do not. A seed governs the head's initial weights, the order of the data and
the dropout, and does so alike for every method.
"""

import copy
import dataclasses
import functools
import math
import time
import warnings
from statistics import mean

import torch
from torch import nn

from . import model as models
from .methods import METHODS
from .metrics import METRICS

EVALUATION_BATCH = 64
EVENLY = 30  # evaluations of one run
BUCKET = 16  # batches that are sorted by length together


class Experiment:
    """A pretrained model and a task, on which methods are run with seeds.

    Attributes:
        children: {method: the child network of its first run}, for methods that have one.
        spectra: {method: spectra of the transformer after a run, beside the pretrained one}, where `look` was called.
    """

    def __init__(self, tokenizer, backbone, task, settings, device):
        self.backbone, self.task, self.settings = backbone, task, settings
        self.device = device
        examples = {"train": task.train, "dev": task.dev, "aside": task.aside}
        examples = {name: part for name, part in examples.items() if part}
        self.targets = {name: torch.tensor(task.targets(part), device=device) for name, part in examples.items()}
        if task.labels is None:  # correlations do not care about mean and scale of the targets, training does
            average, std = self.targets["train"].mean(), self.targets["train"].std()
            self.targets = {name: (values - average) / std for name, values in self.targets.items()}
        self.tokens = {
            name: models.TokenInputs(tokenizer, part, settings.max_length, device) for name, part in examples.items()
        }
        self.features = None  # (of each part, seconds to make those of the training set)
        self.fisher = None  # ((seed, batches), scores, seconds) of the last Fisher pass
        self.children = {}
        self.spectra = {}

    def steps(self, name):
        """Returns the training steps of one run of a method."""
        return count_steps(len(self.task.train), METHODS[name].own(self.settings))

    def run(self, name, seed, on_step=lambda: None, lr=None, part="dev", afterwards=None):
        """Trains one model and scores it along the way.

        Args:
            name: a key of `METHODS`.
            seed: governs head, data order, dropout and, for F and `d-random`, the masks.
            on_step: called after every training step.
            lr: the learning rate; None for the method's own in the settings.
            part: what is scored, "dev" or "aside".
            afterwards: from the trained model to more for the record; None for nothing.

        Returns:
            A dict of plain numbers: scores and losses at each evaluation, seconds of each step, of a frozen encoder's
            features, of the Fisher pass and of the selection (None where there is none), bytes of optimizer state.
        """
        method = METHODS[name]
        settings = method.own(self.settings)
        lr = method.lr(settings) if lr is None else lr
        started = time.perf_counter()
        if method.frozen and lr <= settings.lr:
            warnings.warn(
                f"method {name} trains its head at {lr:g}, no more than the backbone's {settings.lr:g}; a head "
                "alone needs far more and looks worse than it is, so raise --head-lr",
                stacklevel=2,
            )
        torch.manual_seed(seed)  # of weights that a method adds
        model, inputs = self._model(method, seed)
        child, cost = self._child(name, model, seed)
        cost["feature_seconds"] = self.features[1] if method.frozen else None
        torch.manual_seed(seed)
        groups = models.decay_groups(model, settings.weight_decay)
        optimizer = method.optimizer(groups, lr, settings, seed, child)
        record = self._train(model, inputs, optimizer, settings, seed, on_step, part)
        record["seconds"] = time.perf_counter() - started
        density = None if child is None else [row[1:] for row in child.summary().tensors]
        about = {"optimizer_bytes": state_bytes(optimizer), "density": density}  # rows of (layer, kind, kept, weights)
        more = {} if afterwards is None else afterwards(model)
        return {"method": name, "seed": seed, "lr": lr, **cost, **record, **about, **more}

    def _model(self, method, seed):
        """Returns a fresh model and the inputs it reads: tokens, or for a frozen encoder its cached features."""
        outputs = len(self.task.labels) if self.task.labels else 1
        head = models.Head(self.backbone.config.hidden_size, outputs, seed)
        if not method.frozen:
            backbone = copy.deepcopy(self.backbone)
            backbone = method.prepare(backbone) if method.prepare else backbone
            return models.Classifier(backbone, head, self.settings.pooling).to(self.device), self.tokens
        if self.features is None:
            self._make_features()
        return head.to(self.device), self.features[0]

    def _make_features(self):
        encoder, features, seconds = models.Encoder(self.backbone, self.settings.pooling).to(self.device), {}, 0.0
        for part, tokens in self.tokens.items():
            before = self.clock()
            features[part] = models.FeatureInputs(predict(encoder, tokens), tokens.lengths)
            seconds += (self.clock() - before) * (part == "train")
        self.features = features, seconds

    def _child(self, name, model, seed):
        """Returns a method's child network, or None, and the seconds that its Fisher pass and its selection took."""
        method = METHODS[name]
        if method.child is None:
            return None, {"fisher_seconds": None, "selection_seconds": None}
        settings = method.own(self.settings)
        scores, seconds = self._fisher_scores(model, settings, seed) if method.fisher else (None, None)
        before = self.clock()
        child = method.child(model, scores, settings, seed)
        cost = {"fisher_seconds": seconds, "selection_seconds": self.clock() - before}
        self.children.setdefault(name, child)
        return child, cost

    def look(self, name, model):
        """Takes the spectra of what the first run of a method trained, and returns nothing for its record.

        Raises:
            ValueError: a weight outside of the method's child network has moved.
        """
        from childtune_fast import spectra

        child = self.children.get(name)
        found = spectra.analyze(model.encoder.backbone, base=self.backbone, child=child, progress=False)
        if child is not None:
            found.check()
        self.spectra[name] = found
        return {}

    def _fisher_scores(self, model, settings, seed):
        """Returns the Fisher scores of a fresh model and the seconds they took; methods with one seed share them."""
        from childtune_fast import estimate_fisher

        key = seed, settings.fisher_batches
        if self.fisher is None or self.fisher[0] != key:
            inputs, targets = self.tokens["train"], self.targets["train"]
            order = batches(inputs.lengths, dataclasses.replace(settings, epochs=1), seed)
            before = self.clock()
            scores = estimate_fisher(
                model,
                ((inputs.batch(indices), targets[indices]) for indices in order),
                loss_fn=lambda model, batch: self.loss(model(batch[0]), batch[1]),
                max_batches=settings.fisher_batches or None,
                progress=False,
            )
            self.fisher = key, scores, self.clock() - before
        return self.fisher[1:]

    def _train(self, model, inputs, optimizer, settings, seed, on_step, part):
        targets = self.targets["train"]
        steps = count_steps(len(targets), settings)
        factor = functools.partial(learning_rate_factor, steps=steps, warmup=settings.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        due = evaluated_after(steps, settings) if part == "dev" else {steps}
        curve, losses, since, optimizer_seconds, step_seconds = [], [], [], [], []
        for step, indices in enumerate(batches(inputs["train"].lengths, settings, seed), start=1):
            model.train()
            begin = self.clock()
            loss = self.loss(model(inputs["train"].batch(indices)), targets[indices])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            before = self.clock()
            optimizer.step()
            after = self.clock()
            schedule.step()
            optimizer.zero_grad()
            step_seconds.append(self.clock() - begin)
            optimizer_seconds.append(after - before)
            since.append(loss.item())
            if step in due:
                scores, own = self.evaluate(model, inputs, part)
                curve.append((step, scores))
                losses.append((step, mean(since), own))
                since.clear()
            on_step()
        return {"curve": curve, "losses": losses, "optimizer_seconds": optimizer_seconds, "step_seconds": step_seconds}

    def clock(self):
        """Returns the time in seconds, once the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def loss(self, outputs, targets):
        """Returns the mean squared error of a regression, else the cross-entropy: of each label, or between them."""
        if self.task.labels is None:
            return nn.functional.mse_loss(outputs.squeeze(-1), targets)
        if self.task.metric == "roc_auc":
            return nn.functional.binary_cross_entropy_with_logits(outputs, targets)
        return nn.functional.cross_entropy(outputs, targets)

    def evaluate(self, model, inputs, part):
        """Returns the metrics of a model on "dev" or "aside", and its loss there."""
        outputs = predict(model, inputs[part])
        loss = self.loss(outputs, self.targets[part]).item()
        if not outputs.isfinite().all():  # a run that diverged scores as one that predicts the same for all
            outputs = torch.zeros_like(outputs)
        return METRICS[self.task.metric](self.targets[part].cpu(), outputs.cpu()), loss


def count_steps(examples, settings):
    """Returns how many training steps a run of so many examples has."""
    return settings.epochs * math.ceil(examples / settings.batch_size)


def evaluated_after(steps, settings):
    """Returns the steps of a run after which it is evaluated, the last among them.

    With `evaluations_per_epoch` they are so many an epoch; of more than `EVENLY` in all, at most a hundred that lie
    evenly on a logarithmic axis, so that a thousand epochs can be drawn beside three.
    """
    count = settings.evaluations_per_epoch * settings.epochs
    if not count:
        return {round(steps * i / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    kept = range(1, count + 1) if count <= EVENLY else {round(count ** (i / 99)) for i in range(100)}
    return {round(steps * i / count) for i in kept}


def learning_rate_factor(step, steps, warmup):
    """Returns the share of the full learning rate at a step, from 0: linear warm-up, then linear decay to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


def batches(lengths, settings, seed):
    """Yields the indices of every batch of every epoch: shuffled, but with like lengths together to save padding."""
    generator = torch.Generator().manual_seed(seed)
    size = settings.batch_size
    for _ in range(settings.epochs):
        order = torch.randperm(len(lengths), generator=generator).tolist()
        bucketed = []
        for start in range(0, len(order), size * BUCKET):
            bucket = sorted(order[start : start + size * BUCKET], key=lambda i: lengths[i])
            bucketed += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        yield from (bucketed[i] for i in torch.randperm(len(bucketed), generator=generator).tolist())


@torch.no_grad()
def predict(model, inputs):
    """Returns the model's outputs for all inputs, in their order, without dropout."""
    model.eval()
    order = sorted(range(len(inputs.lengths)), key=lambda i: inputs.lengths[i])
    chunks = [order[i : i + EVALUATION_BATCH] for i in range(0, len(order), EVALUATION_BATCH)]
    outputs = torch.cat([model(inputs.batch(chunk)) for chunk in chunks])
    return outputs[torch.tensor(order).argsort()]


def state_bytes(optimizer):
    """Returns the size of all tensors that an optimizer keeps between steps."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    values += [mask.bits for mask in getattr(optimizer, "child_masks", {}).values()]
    return sum(value.nbytes for value in values if torch.is_tensor(value))
