"""ChildTuningTrainer: transformers.Trainer that trains a child network of the weights.

    trainer = ChildTuningTrainer(model=model, args=args, train_dataset=data, child_tuning=ChildTuningConfig(mode="D"))

Decay groups, clipping, schedule, data order and dropout are Trainer's own in both modes.
"""

try:
    from transformers import Trainer

    from .mixin import ChildTuning
    from .spectra import SpectraCallback
except ImportError as error:
    raise ImportError(
        "childtune_fast.integrations.transformers needs transformers 4.47 or newer, and accelerate (got: "
        f"{error}); pip install 'childtune-fast[transformers]'"
    ) from error

from .config import CHILD_FILE, ChildTuningConfig

__all__ = ["CHILD_FILE", "ChildTuning", "ChildTuningConfig", "ChildTuningTrainer", "SpectraCallback"]


class ChildTuningTrainer(ChildTuning, Trainer):
    """transformers.Trainer with ChildAdamW instead of AdamW; `ChildTuning` says what that does, and its argument.

    For a subclass of Trainer, such as Seq2SeqTrainer, write the same line with that class:

        class ChildTuningSeq2SeqTrainer(ChildTuning, Seq2SeqTrainer): pass
    """
