"""docs/recipes/trainers.md: each recipe runs, and trains the child network of that trainer's own loss."""

import pytest
import torch
from models import family
from pages import run
from trainer_runs import EXAMPLES, arguments, make_data, weights
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainingArguments

from childtune_fast import ChildNetwork

ONE_BATCH = {"per_device_train_batch_size": EXAMPLES, "num_train_epochs": 4}


def recipe(heading, **names):
    return run("recipes/trainers.md", heading, **names)["trainer"]


def seeded(make, **options):
    """The same model in every call, without dropout."""
    torch.manual_seed(0)
    return make(**options)


def by_hand(model, loss):
    """The child network of one batch's squared gradients."""
    model.eval()
    loss.backward()
    scores = {name: param.grad.square() for name, param in model.named_parameters() if param.grad is not None}
    return ChildNetwork.from_scores(model, scores, reserve_p=0.3)


def check_trained(trainer, before, expected):
    """The child network is the expected one, but for scores that differ in their last bits, and moves alone."""
    assert trainer.child_network.overlap(expected) > 0.99
    masks, after = trainer.child_network.masks(), weights(trainer.model)
    for name, mask in masks.items():
        moved = before[name].view(torch.int32) != after[name].view(torch.int32)
        assert not moved[~mask].any(), name
        assert moved[mask].any() or not mask.any(), name
    return after


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, **{f"w{i}": i for i in range(3, 40)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


def test_seq2seq(tmp_path):
    def make():
        return family("T5", dropout_rate=0.0, decoder_start_token_id=0)[0]

    def collator(rows):
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    model, data = seeded(make), make_data("seq2seq")
    before, same = weights(model), seeded(make)
    args = arguments(tmp_path, Seq2SeqTrainingArguments, **ONE_BATCH)
    trainer = recipe("Seq2SeqTrainer", model=model, args=args, data=data, collator=collator)
    check_trained(trainer, before, by_hand(same, same(**collator(data)).loss))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # SFTConfig's own default
def test_sft(tmp_path, tokenizer):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [row["input_ids"] for row in make_data()]
    data = datasets.Dataset.from_list([{"text": " ".join(f"w{i}" for i in row)} for row in rows])
    model = seeded(lambda: family("LLaMA", attention_dropout=0.0)[0])
    before, same = weights(model), seeded(lambda: family("LLaMA", attention_dropout=0.0)[0])
    args = arguments(tmp_path, trl.SFTConfig, eos_token="[EOS]", **ONE_BATCH)
    trainer = recipe("trl's SFTTrainer", model=model, args=args, data=data, tokenizer=tokenizer)
    tokens = torch.tensor([[*row, 2] for row in rows])
    check_trained(trainer, before, by_hand(same, same(input_ids=tokens, labels=tokens).loss))
    # It adds up in compute_loss, for the next log, what the pass that estimates scores must not add to.
    assert not trainer._metrics["eval"]
    assert trainer._total_train_tokens == 4 * tokens.numel()


def test_sentence_transformers(tmp_path, tokenizer):
    sentence_transformers, datasets = pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer import losses, modules

    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = seeded(lambda: family("BERT", **options)[0].bert)
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")

    def make():
        transformer = modules.Transformer(str(tmp_path / "bert"))
        model = sentence_transformers.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")
        return model, losses.SoftmaxLoss(model, 16, num_labels=3)

    rows = make_data()
    texts = [" ".join(f"w{i}" for i in row["input_ids"]) for row in rows]
    data = datasets.Dataset.from_dict({"a": texts, "b": texts[::-1], "label": [row["labels"] for row in rows]})
    (model, loss), (same, same_loss) = seeded(make), seeded(make)
    before, of_loss = weights(model), weights(loss.classifier)
    args = arguments(tmp_path, sentence_transformers.SentenceTransformerTrainingArguments, **ONE_BATCH)
    trainer = recipe("SentenceTransformerTrainer", model=model, args=args, data=data, loss=loss)
    features = [same.tokenize(data["a"]), same.tokenize(data["b"])]
    check_trained(trainer, before, by_hand(same, same_loss(features, torch.tensor(data["label"]))))
    for name, param in weights(loss.classifier).items():
        assert (param != of_loss[name]).all(), name  # trained, and in full
