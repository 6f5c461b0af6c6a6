"""Records of runs that the fine-tuning harness could have made."""

from benchmarks.finetune import runs

SETTINGS = (("batch_size", 16), ("epochs", 3), ("reserve_p", 0.3), ("reserve_p_d", 0.3))
SPEC = runs.Spec("task", "", 0.0, 0, "", "model", 32, SETTINGS)


def record_of(spec, score, constant=0.5, **more):
    """The record of a run as a worker writes it."""
    return {
        "method": spec.method,
        "seed": spec.seed,
        "lr": spec.lr,
        "curve": [[2, {"accuracy": 0.1, "macro F1": 0.0}], [4, {"accuracy": score, "macro F1": 0.25}]],
        "seconds": 1.0,
        "optimizer_seconds": 0.01,
        "step_seconds": 0.1,
        "fisher_seconds": None,
        "selection_seconds": None,
        "optimizer_bytes": 8_000_000,
        "density": None,
        "constant_score": constant,
        "scored": 100,
        "data": {"fingerprint": "abc", "train": 32},
        "versions": {"python": "3"},
        **more,
    }
