"""Selection of the k highest scores: against a stable sort on adversarial scores, on both backends, any threads."""

import itertools
import math

import pytest
import torch
from dispatches import Dispatches
from helpers import both_backends
from scores import DENORMAL, KINDS, SLICE, tensors, values

from childtune_fast.native import load
from childtune_fast.ops import radix, reference
from childtune_fast.ops.packed_mask import PackedMask
from childtune_fast.ops.select import top_k


def oracle(scores, k, largest):
    """Sorts (score, index) pairs in float64, where no score is denormal."""
    flat = torch.cat([tensor.reshape(-1) for tensor in scores.values()]).double()
    order = sorted(range(len(flat)), key=(-flat if largest else flat).tolist().__getitem__)  # stable, and 0.0 == -0.0
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[:k]] = True
    return chosen


def flat_mask(masks):
    return torch.cat([mask.unpack().reshape(-1) for mask in masks.values()])


@pytest.fixture
def on(monkeypatch):
    """Sets the backend that "auto" stands for."""
    return lambda name: monkeypatch.setenv("CHILDTUNE_BACKEND", name)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_stable_sort(kind, backend, on):
    on(backend)
    scores = tensors(kind, sizes=(100, 1, 0, 1023, 1024, 1025, 33))
    total = sum(tensor.numel() for tensor in scores.values())
    for largest in (True, False):
        for k in (0, 1, total // 1000, round(0.3 * total), total - 1, total):
            assert torch.equal(flat_mask(top_k(scores, k, largest=largest)), oracle(scores, k, largest))


@pytest.mark.parametrize("kind", KINDS)
def test_native_equals_torch_for_any_number_of_threads_and_instruction_set(kind, on, threads, native):
    scores = tensors(kind, sizes=(1000, 1, 0, 5 * SLICE + 77, 1024, SLICE, 3 * SLICE - 1))
    total = sum(tensor.numel() for tensor in scores.values())
    for largest, share in ((True, 0.001), (True, 0.3), (False, 0.3)):
        k = round(share * total)
        on("torch")
        expected = top_k(scores, k, largest=largest)
        on("native")
        for name, count in itertools.product(native.supported_instruction_sets(), (1, 2, 3)):
            native.set_instruction_set(name)
            threads(count)
            masks = top_k(scores, k, largest=largest)
            assert sum(mask.count for mask in masks.values()) == k
            assert all(torch.equal(masks[name].bits, expected[name].bits) for name in scores)


@pytest.mark.parametrize("k", [999, 1000, 1001, SLICE - 1, SLICE, 1000 + SLICE, 1000 + SLICE + 5])
def test_ties_go_to_the_lower_index_across_tensors_and_slices(k):
    masks = top_k({"a": torch.zeros(10, 100), "b": torch.zeros(2 * SLICE)}, k)
    assert torch.equal(flat_mask(masks), torch.arange(1000 + 2 * SLICE) < k)


@both_backends
def test_denormals_are_told_apart_where_torch_flushes_them(backend, on):
    on(backend)
    scores = {"a": torch.tensor([0.0, DENORMAL, 2 * DENORMAL, -DENORMAL])}
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        highest, lowest = (top_k(scores, 2, largest=largest)["a"] for largest in (True, False))
    finally:
        torch.set_flush_denormal(False)
    assert highest.unpack().tolist() == [False, True, True, False]
    assert lowest.unpack().tolist() == [True, False, False, True]


@both_backends
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_nan_raises_and_names_the_first_parameter_that_has_one(nan, backend, on):
    on(backend)
    scores = tensors("normal")
    scores["tensor 3"][-1] = nan
    scores["tensor 6"][0] = nan
    with pytest.raises(ValueError, match=r"scores must not be NaN \(got one or more for 'tensor 3'\)"):
        top_k(scores, 10)


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_widen(dtype, backend, on):
    on(backend)
    scores = {"a": values(3000, "normal").to(dtype)}
    assert torch.equal(top_k(scores, 900)["a"].bits, top_k({"a": scores["a"].float()}, 900)["a"].bits)


@both_backends
def test_a_mask_goes_by_logical_index_whatever_the_strides(backend, on):
    on(backend)
    scores = values(3000, "normal").view(50, 60)
    strided = scores.t().contiguous().t()
    assert torch.equal(top_k({"a": strided}, 900)["a"].bits, top_k({"a": scores}, 900)["a"].bits)


def test_float64_scores_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"got torch.float64 for 'a'\); convert them with .float\(\)"):
        top_k({"a": torch.zeros(3, dtype=torch.float64)}, 1)


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"between 0 and the number of scores, 3 \(got {k}\)"):
        top_k({"a": torch.zeros(3)}, k)


@both_backends
def test_no_scores(backend, on):
    on(backend)
    assert top_k({}, 0) == {}
    assert isinstance(top_k({"a": torch.zeros(0, 3)}, 0)["a"], PackedMask)


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_equals_the_reference_over_chunks_and_devices(kind, devices, monkeypatch):
    monkeypatch.setattr(radix, "_CHUNK_BLOCKS", 3)
    scores = tensors(kind, sizes=(100, 1, 0, 1023, 1024, 1025, 33, 9000, 3072))
    total = sum(tensor.numel() for tensor in scores.values())
    for largest, k in itertools.product((True, False), (0, 1, total // 3, total)):
        expected = reference.select(list(scores), list(scores.values()), k, largest)
        numbered = list(enumerate(scores.values()))
        parts = [radix.InTorch(torch.device("cpu"), dict(numbered[i::devices]), largest) for i in range(devices)]
        found = radix.select_in_parts(parts, k)
        assert all(torch.equal(found[i], bits) for i, bits in enumerate(expected))


def test_what_torch_takes_does_not_grow_with_the_scores(on, monkeypatch):
    """Beside the masks, and copies of what is not float32 already. At full size it is 19 MB."""
    monkeypatch.setattr(radix, "_CHUNK_BLOCKS", 64)
    on("torch")
    peaks = []
    for size in (1 << 18, 3 << 17):
        scores = {"a": torch.linspace(-1, 1, size), "b": torch.ones(5000)}
        with Dispatches(known=scores.values()) as dispatches:
            masks = top_k(scores, size // 3)
        peaks.append(dispatches.peak - sum(mask.bits.numel() for mask in masks.values()))
    assert 4 < peaks[0] / (64 * 1024) < 19  # bytes for each score of a chunk
    assert peaks[1] - peaks[0] < 1 << 16  # counts of ties, four bytes for each block of 1024


def test_torch_waits_for_a_device_once_in_a_pass(on):
    on("torch")
    counts = []
    for many in (2, 300):
        with Dispatches() as dispatches:
            top_k({str(i): torch.ones(33) for i in range(many)}, 10)
        counts.append(dispatches.names["aten._local_scalar_dense.default"])
    assert counts[0] == counts[1]


FLOATS, BITS = torch.zeros(1025), torch.zeros(256, dtype=torch.uint8)
NONSENSE = {
    "no tensor": ([1], [BITS], 1, TypeError),
    "no bits": ([FLOATS], [], 1, ValueError),
    "double": ([FLOATS.double()], [BITS], 1, ValueError),
    "strided scores": ([torch.zeros(2050)[::2]], [BITS], 1, ValueError),
    "short bits": ([FLOATS], [BITS[:255]], 1, ValueError),
    "strided bits": ([FLOATS], [torch.zeros(512, dtype=torch.uint8)[::2]], 1, ValueError),
    "signed bits": ([FLOATS], [BITS.view(torch.int8)], 1, ValueError),
    "scores elsewhere": ([FLOATS.to("meta")], [BITS], 1, (ValueError, BufferError, RuntimeError)),
    "bits elsewhere": ([FLOATS], [BITS.to("meta")], 1, (ValueError, BufferError, RuntimeError)),
    "k negative": ([FLOATS], [BITS], -1, ValueError),
    "k beyond": ([FLOATS], [BITS], 1026, ValueError),
}


@pytest.mark.parametrize("forced", [False, True], ids=["exchange", "attributes"])
@pytest.mark.parametrize(("scores", "bits", "k", "error"), NONSENSE.values(), ids=NONSENSE)
def test_the_compiled_function_refuses_what_it_cannot_take(scores, bits, k, error, forced):
    native = load.load_native()
    native.force_attribute_access(forced)
    try:
        native.select_top([FLOATS], [BITS.clone()], 5, True, 2)
        with pytest.raises(error):
            native.select_top(scores, bits, k, True, 2)
    finally:
        native.force_attribute_access(False)
    assert not BITS.any()
