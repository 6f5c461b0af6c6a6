"""Files whose digest is right and whose contents are wrong: refused with a sentence, before anything is written."""

import re

import pytest
import torch
from forged_files import Model, contents_of, masks, same_state, state_of, use, write

from childtune_fast import ChildNetwork
from childtune_fast.child import files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def put(key, change):
    """Puts another tensor into the place of one."""

    def changed(tensors, _):
        tensors[key] = change(tensors.get(key))

    return changed


def drop(key):
    return lambda tensors, _: tensors.pop(key)


def describe(*keys, value):
    """Gives a part of the description another value."""

    def changed(_, description):
        *outer, last = keys
        for key in outer:
            description = description[key]
        description[last] = value

    return changed


def shorter(tensor):
    return tensor[:-1].clone()


def longer(tensor):
    return torch.cat([tensor, tensor[:1]])


def other_bits(tensor):
    tensor = tensor.clone()
    tensor[100] = 1
    return tensor


def shorten_both(tensors, _):
    for part in ("scale", "zero_point"):
        tensors[f"full.{part}/channels"] = shorter(tensors[f"full.{part}/channels"])


def mask_a_buffer(tensors, description):
    tensors["bits/scalar"] = torch.zeros(128, dtype=torch.uint8)
    tensors["values/scalar"] = tensors.pop("full/scalar")[None][:0].clone()
    description["base"]["scalar"] = files.digest(Model().scalar)


def as_is(value):
    return lambda _: value


SHAPES = [3, None, "23", {}, [2.0, 3], [2, 3.5], [-1, 3], [-2, -3], [True, 3], ["2", 3], [[2], 3], [2, 3, 1], [6], []]
SHAPES += [[3, 2], [2, 1 << 63], [2, 1 << 64], [10**300]]
OF_BOTH = {f"a shape {value!r:.30}": describe("shapes", "a", value=value) for value in SHAPES}
OF_BOTH |= {f"shapes {value!r}": describe("shapes", value=value) for value in ({}, None, [2, 3], "2", {"a": [2, 3]})}
OF_BOTH["no shape"] = lambda _, description: description["shapes"].pop("a")
OF_BOTH["another shape"] = describe("shapes", "more", value=[2, 3])
DELTAS = {
    **OF_BOTH,
    "values too short": put("values/a", shorter),
    "values too long": put("values/c", longer),
    "one value": put("values/c", as_is(torch.ones(1, dtype=torch.float64))),
    "a value without dimensions": put("values/c", as_is(torch.tensor(1.0, dtype=torch.float64))),
    "values of another dtype": put("values/a", torch.Tensor.double),
    "values in two dimensions": put("values/a", lambda values: values[:, None].clone()),
    "no values": drop("values/b"),
    "values without a mask": drop("bits/b"),
    "bits too short": put("bits/c", shorter),
    "bits too long": put("bits/c", longer),
    "bits of another dtype": put("bits/a", lambda bits: bits.view(torch.int8)),
    "bits beyond the last weight": put("bits/a", other_bits),
    "more bits than values": put("bits/c", lambda bits: bits | 1 << 1),
    "of another shape": put("full/full", lambda full: full.view(2, 2).clone()),
    "of one element": put("full/full", shorter),
    "a single element": put("full/full", as_is(torch.ones(1))),
    "a scalar for a vector": put("full/full", as_is(torch.tensor(1.0))),
    "a vector for a scalar": put("full/scalar", as_is(torch.tensor([4]))),
    "of another dtype": put("full/full", torch.Tensor.half),
    "not there": drop("full/full"),
    "no digest": lambda _, description: description["base"].pop("frozen"),
    "no digest of a masked one": lambda _, description: description["base"].pop("a"),
    "another digest": describe("base", "frozen", value="0" * 64),
    "a digest and the whole": describe("base", "full", value="0" * 64),
    "a digest that is a number": describe("base", "frozen", value=7),
    "a digest that is a list": describe("base", "a", value=["0"]),
    "digests in a list": describe("base", value=[]),
    "no digests": describe("base", value=None),
    "a name of nothing": put("bits/", as_is(torch.ones(1))),
    "nothing": put("", as_is(torch.ones(1))),
    "a name alone": put("full", as_is(torch.ones(1))),
    "a part of an unknown name": put("values.x/a", as_is(torch.ones(1))),
    "a whole beside a mask": put("full/a", as_is(torch.ones(2, 3))),
    "a dense part of nothing": put("full./full", as_is(torch.ones(4))),
    "another tensor's name": put("full/other", as_is(torch.ones(1))),
    "an unknown kind": describe("kinds", "full", value="striped"),
    "the kind of another": describe("kinds", "full", value="sparse_coo"),
    "a kind without values": describe("kinds", "frozen", value="meta"),
    "a masked kind": describe("kinds", "a", value="sparse_csr"),
    "a kind that is a list": describe("kinds", "coo", value=[]),
    "kinds in a list": describe("kinds", value=["sparse_coo"]),
    "no kinds": describe("kinds", value={}),
    "sparse, without a part": drop("full.values/coo"),
    "sparse, with another part": put("full.more/coo", as_is(torch.ones(1))),
    "sparse, with an index outside": put("full.indices/coo", lambda indices: indices + 1),
    "sparse, with an index below": put("full.indices/coo", lambda indices: indices - 1),
    "sparse, in no order": put("full.indices/coo", lambda indices: indices.flip(1)),
    "sparse, of other values": put("full.values/coo", shorter),
    "sparse, with complex indices": put("full.indices/coo", lambda indices: indices.to(torch.complex64)),
    "sparse, of two values": put("full.coalesced/coo", as_is(torch.tensor([True, False]))),
    "compressed, with a row outside": put("full.crow_indices/csr", lambda rows: rows + 1),
    "compressed, with a column outside": put("full.col_indices/csr", lambda columns: columns + 3),
    "compressed, too short": put("full.crow_indices/csr", shorter),
    "compressed, of floats": put("full.crow_indices/csr", torch.Tensor.float),
    "quantised, of another type": put("full.integers/whole", torch.Tensor.long),
    "quantised, of another shape": put("full.integers/whole", lambda integers: integers.t().contiguous()),
    "quantised, with two scales": put("full.scale/whole", as_is(torch.ones(2, dtype=torch.float64))),
    "quantised, with a scale of another type": put("full.scale/whole", torch.Tensor.float),
    "quantised, with too few scales": put("full.scale/channels", shorter),
    "quantised, with too few of both": shorten_both,
    "quantised, along no dimension": put("full.axis/channels", as_is(torch.tensor(2))),
    "quantised, along a negative one": put("full.axis/channels", as_is(torch.tensor(-2))),
    "quantised, along another": put("full.axis/channels", as_is(torch.tensor(1))),
    "the mask of a buffer": mask_a_buffer,
}


CHILDREN = {
    **OF_BOTH,
    "bits too short": put("a", shorter),
    "bits too long": put("c", longer),
    "bits of another dtype": put("a", lambda bits: bits.view(torch.int8)),
    "bits beyond the last weight": put("a", other_bits),
    "other bits": put("c", lambda bits: bits ^ 1 << 1),
    "not there": drop("a"),
    "another": put("other", as_is(torch.zeros(128, dtype=torch.uint8))),
    "a name of nothing": put("", as_is(torch.zeros(128, dtype=torch.uint8))),
    "another fingerprint": describe("fingerprint", value="0" * 64),
    "a fingerprint that is a number": describe("fingerprint", value=0),
    "no fingerprint": lambda _, description: description.pop("fingerprint"),
}
CASES = [("delta", name, change) for name, change in DELTAS.items()]
CASES += [("child network", name, change) for name, change in CHILDREN.items()]


def assert_refused(path, kind, model=None):
    model = model or Model()
    before = state_of(model)
    with pytest.raises(ValueError, match=re.escape(f"'{path}'")) as caught:
        use(path, kind, model)
    assert "\n" not in str(caught.value)
    assert same_state(model, before)


@pytest.mark.parametrize(("kind", "change"), [case[::2] for case in CASES], ids=["-".join(case[:2]) for case in CASES])
def test_wrong_contents_are_refused_and_nothing_is_written(path, kind, change):
    tensors, description = contents_of(path, kind)
    change(tensors, description)
    write(path, kind, tensors, description)
    assert_refused(path, kind)


DESCRIPTIONS = [
    "{}",
    "null",
    "[]",
    "7",
    '"text"',
    "",
    "{",
    "NaN",
    "[" * 100_000,
    "1" * 5000,
    '{"shapes": {"\\ud800": []}}',
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda text: text[:20])
@pytest.mark.parametrize("kind", ["delta", "child network"])
def test_a_wrong_description_is_refused(path, kind, description):
    for tensors in ({}, contents_of(path, kind)[0]):
        write(path, kind, tensors, description)
        assert_refused(path, kind)


@pytest.mark.parametrize("kind", ["delta", "child network"])
def test_what_safetensors_alone_wrote_is_read(path, kind):
    """As files of earlier versions are, whose metadata is in any order."""
    write(path, kind, *contents_of(path, kind))
    model = Model()
    child = use(path, kind, model)
    assert child.fingerprint == ChildNetwork.from_masks(Model(), masks()).fingerprint
    assert same_state(model, state_of(Model(tuned=kind == "delta")))


def test_the_sentence_says_what_does_not_fit(path):
    tensors, description = contents_of(path, "delta")
    tensors["values/a"] = torch.ones(1)
    write(path, "delta", tensors, description)
    with pytest.raises(
        ValueError, match=r"must hold the 2 values of 'a' that its mask selects \(got the shape \(1,\)\)"
    ):
        ChildNetwork.apply_delta(path, Model())
