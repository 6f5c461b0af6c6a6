"""Which layers are found in modules and in files, by which names, and why others are left out."""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from childtune_fast import spectra


def analyzed(model, **options):
    return spectra.analyze(model, progress=False, **options)


def named(found):
    return {row.longname: (row.layer_type, row.N, row.M, row.rf) for row in found}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0)
    )


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=3, **sizes))


def test_bert_is_embeddings_and_linear_layers_in_the_model_s_order():
    model = BertModel(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    )
    assert named(analyzed(model)) == {
        "embeddings.word_embeddings": ("embedding", 64, 32, 1),
        "embeddings.position_embeddings": ("embedding", 512, 32, 1),
        "encoder.layer.0.attention.self.query": ("dense", 32, 32, 1),
        "encoder.layer.0.attention.self.key": ("dense", 32, 32, 1),
        "encoder.layer.0.attention.self.value": ("dense", 32, 32, 1),
        "encoder.layer.0.attention.output.dense": ("dense", 32, 32, 1),
        "encoder.layer.0.intermediate.dense": ("dense", 48, 32, 1),
        "encoder.layer.0.output.dense": ("dense", 48, 32, 1),
        "pooler.dense": ("dense", 32, 32, 1),
    }
    assert analyzed(model).skipped == {"embeddings.token_type_embeddings": "2 eigenvalues, which are fewer than 8"}


def test_gpt2_s_fused_layer_is_one_and_split_when_asked():
    model = gpt2()
    whole, split = analyzed(model), analyzed(model, split_fused=True)
    assert named(whole)["transformer.h.0.attn.c_attn"] == ("conv1d", 96, 32, 1)
    parts = [row for row in split if "c_attn" in row.longname]
    assert [row.longname[-1] for row in parts] == ["q", "k", "v"]
    weight = model.transformer.h[0].attn.c_attn.weight.detach().double()  # [inputs, outputs]
    for i, row in enumerate(parts):
        expected = torch.linalg.matrix_norm(weight[:, 32 * i : 32 * i + 32], 2).square()
        assert row.xmax == pytest.approx(float(expected), rel=1e-12)
    assert whole.skipped == {"lm_head": "tied to transformer.wte"}


def test_attention_s_in_proj_is_split():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2)
    rows = {row.longname: row for row in analyzed(nn.Sequential(attention))}
    assert list(rows) == ["0.in_proj.q", "0.in_proj.k", "0.in_proj.v", "0.out_proj"]
    for i, part in enumerate("qkv"):
        expected = torch.linalg.matrix_norm(attention.in_proj_weight.detach().double()[32 * i :][:32], 2).square()
        assert rows[f"0.in_proj.{part}"].xmax == pytest.approx(float(expected), rel=1e-12)
    other = analyzed(nn.MultiheadAttention(32, 2, kdim=16, vdim=24))
    assert [row.M for row in other] == [32, 16, 24, 32]


def test_each_stacked_expert_is_a_layer():
    model = mixtral()
    rows = {row.longname: row for row in analyzed(model)}
    stacked = model.model.layers[0].mlp.experts.down_proj.detach().double()
    for i in range(3):
        row = rows[f"model.layers.0.mlp.experts.down_proj.{i}"]
        assert row.xmax == pytest.approx(float(torch.linalg.matrix_norm(stacked[i], 2).square()), rel=1e-12)
        assert (row.layer_type, row.N, row.M) == ("dense", 48, 32)


def test_a_convolution_s_slices_are_pooled_and_halved():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, (3, 2))
    (row,) = analyzed(conv)
    slices = conv.weight.detach().double().flatten(2).unbind(2)
    expected = torch.cat([torch.linalg.svdvals(matrix).square() / 2 for matrix in slices])
    assert (row.layer_type, row.N, row.M, row.rf, row.num_evals) == ("conv2d", 24, 16, 6, 96)
    assert row.xmax == pytest.approx(float(expected.max()), rel=1e-12)
    assert 10**row.log_norm == pytest.approx(float(expected.sum()), rel=1e-12)


def test_a_tied_layer_counts_once():
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=8, d_kv=4))
    found = analyzed(model)
    assert {name for name, why in found.skipped.items() if why == "tied to shared"} == {
        "encoder.embed_tokens", "decoder.embed_tokens", "lm_head",
    }  # fmt: skip
    assert [row.longname for row in found][:1] == ["shared"]


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this kind is deprecated
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(32, 32)), {nn.Linear}, torch.qint8)


def freed():
    layer = nn.Linear(32, 32)
    layer.weight.untyped_storage().resize_(0)
    return layer


def partitioned():
    layer = nn.Linear(32, 32)
    layer.weight.data = torch.empty(0)  # as DeepSpeed's ZeRO-3 leaves it
    return layer


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: nn.LSTM(32, 32), "weight_hh_l0", "recurrent (LSTM)"),
        (lambda: nn.GRUCell(32, 32), "weight_ih", "recurrent (GRUCell)"),
        (quantised, "0", "quantised (Linear)"),
        (lambda: nn.Linear(32, 32).to(torch.float8_e4m3fn), "weight", "quantised (torch.float8_e4m3fn)"),
        (lambda: nn.Linear(32, 32, device="meta"), "weight", "on the meta device"),
        (lambda: nn.LazyLinear(32), "weight", "not initialized"),
        (lambda: nn.Linear(32, 7), "weight", "7 eigenvalues, which are fewer than 8"),
        (lambda: nn.Linear(32, 32, dtype=torch.complex64), "weight", "complex"),
        (freed, "weight", "its values are elsewhere"),
        (partitioned, "weight", "its values are elsewhere"),
        (lambda: nn.Conv1d(16, 16, 3), "weight", "of no known kind (weight of Conv1d, 3 dimensions)"),
        (lambda: nn.ConvTranspose2d(16, 16, 3), "weight", "of no known kind"),
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)),
            "parametrizations.weight.original",
            "parametrized",
        ),
    ],
)
def test_what_is_left_out_is_named_with_its_reason(make, name, reason):
    found = analyzed(make())
    assert len(found) == 0
    assert found.skipped[name].startswith(reason)
    assert str(found).startswith("0 layers")


def test_more_eigenvalues_than_weightwatcher_takes_are_left_out(monkeypatch):
    monkeypatch.setattr("childtune_fast.spectra.layers.MAX_EVALS", 31)
    assert analyzed(nn.Linear(32, 32)).skipped == {"weight": "32 eigenvalues, which are more than 31"}


def test_vectors_and_buffers_are_no_layers():
    model = nn.Sequential(nn.LayerNorm(32), nn.BatchNorm1d(32), nn.Linear(32, 32))
    model.register_buffer("positions", torch.arange(64).view(8, 8))
    found = analyzed(model)
    assert [row.longname for row in found] == ["2"]
    assert found.skipped == {}
    assert [row.longname for row in analyzed(model.state_dict())] == ["2"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch.compile's own
def test_wrappers_leave_no_trace_in_names():
    model = nn.Sequential(nn.Linear(32, 32))
    assert [row.longname for row in analyzed(torch.compile(model))] == ["0"]
    assert [row.longname for row in analyzed(nn.DataParallel(model))] == ["0"]


def convolution_and_attention():
    return nn.Sequential(nn.Conv2d(16, 24, 3), nn.MultiheadAttention(32, 2))


@pytest.mark.parametrize("make", [gpt2, mixtral, convolution_and_attention])
@pytest.mark.parametrize("split_fused", [False, True])
def test_names_in_a_file_tell_what_modules_tell(make, split_fused, tmp_path):
    """But for the order, which is that of the alphabet there."""
    model = make()
    of_model = analyzed(model, split_fused=split_fused, null=1)
    left_out = {f"{name}.weight" for name in of_model.skipped}
    save_file({n: t for n, t in model.state_dict().items() if n not in left_out}, tmp_path / "model.safetensors")
    for stored in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        of_file = analyzed(stored, split_fused=split_fused, null=1)
        assert {row.longname: row for row in of_file} == {row.longname: row for row in of_model}  # to the last bit


def test_a_state_dict_s_tied_and_unreadable_tensors_are_skipped():
    model = gpt2()
    found = analyzed(model.state_dict())
    assert named(found) == named(analyzed(model))
    assert found.skipped == {"lm_head": "tied to transformer.wte"}
    freed_tensor = torch.randn(16, 16)
    freed_tensor.untyped_storage().resize_(0)
    found = analyzed({
        1: torch.randn(16, 16), "meta.weight": torch.empty(16, 16, device="meta"), "freed.weight": freed_tensor,
        "sparse.weight": torch.eye(16).to_sparse(), "complex.weight": torch.eye(16) * 1j,
        "a.weight": torch.randn(16, 16),
    })  # fmt: skip
    assert [row.longname for row in found] == ["a"]
    assert list(found.skipped) == ["meta", "freed", "sparse", "complex"]
    assert found.skipped["complex"] == "complex"


def test_a_tied_base_has_both_names():
    """As a model whose head was untied, or a state dict, needs them."""
    model = gpt2()
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {row.longname: row.moved for row in analyzed(untied, base=model)}["lm_head"] == 0


class Doubled(nn.Module):
    """Computes what it is asked for, and counts how often."""

    def __init__(self):
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, weight):
        self.asked += 1
        return weight + torch.rand_like(weight)


def test_a_computed_weight_is_not_computed():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    random = torch.get_rng_state()
    assert list(analyzed(layer).skipped) == ["parametrizations.weight.original"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
