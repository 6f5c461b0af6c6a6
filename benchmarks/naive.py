"""The naive step: Child-Tuning_F as the published code computes it, tensor by tensor, with its costs.

Written from a description of that code (docs/numerics.md): the old Hugging Face AdamW loop, in which every tensor draws
a full-size float mask from `torch.distributions`, divides it by p and multiplies it into `p.grad`.
"""

import math

import torch
from torch.distributions import Bernoulli


class NaiveChildAdamW(torch.optim.Optimizer):
    """Child-Tuning_F with the arithmetic, the temporary tensors and the checks of the published code."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, reserve_p=0.3):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "reserve_p": reserve_p}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step; overwrites the gradients with the masked ones."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._mask(param.grad, group["reserve_p"])
                    self._update(param, group)
        return loss

    @staticmethod
    def _mask(grad, reserve_p):
        keep = Bernoulli(grad.new_full(grad.shape, reserve_p))
        grad.mul_(keep.sample() / reserve_p)

    def _update(self, param, group):
        state, grad = self.state[param], param.grad
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        state["step"] += 1
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().add_(group["eps"])
        corrections = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        param.addcdiv_(exp_avg, denominator, value=-group["lr"] * corrections)
        if group["weight_decay"] > 0:
            param.add_(param, alpha=-group["lr"] * group["weight_decay"])
