"""AdamW in decimal numbers: the truth that float64 is measured by, too."""

from decimal import Decimal

import numpy as np


def decimals(tensor):
    """A numpy array of exact Decimals."""
    return np.asarray(np.frompyfunc(Decimal, 1, 1)(tensor.detach().double().numpy()), dtype=object)


def exact_adamw(
    param,
    grads,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    amsgrad=False,
    maximize=False,
    foreach=None,
    fused=None,
):
    """AdamW in decimal numbers of 28 digits: the truth that float64 is measured by, too."""
    lr, beta1, beta2, eps, weight_decay = (Decimal(float(x)) for x in (lr, *betas, eps, weight_decay))
    p, m, v, v_max = decimals(param), Decimal(0), Decimal(0), Decimal(0)
    for t, grad in enumerate(grads, 1):
        g = -decimals(grad) if maximize else decimals(grad)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = np.maximum(v_max, v)
        denom = np.sqrt(v_max if amsgrad else v) / (1 - beta2**t).sqrt() + eps
        p = p * (1 - lr * weight_decay) - lr / (1 - beta1**t) * m / denom
    return p
