"""What is added up while scores are estimated is kept apart, whatever holds it, and whatever else an object has."""

from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from childtune_fast.integrations.records import in_copies


class Touchy(OrderedDict):
    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key, last=False)


class Fixed(dict):
    def __setitem__(self, key, value):
        raise TypeError("fixed")


def test_records_are_what_they_were():
    shared = []
    by_mode = {"train": shared, 3: defaultdict(list)}
    owner = SimpleNamespace(_hidden=[], shared=shared, by_mode=by_mode, count=0, total=torch.zeros(()), late=None)
    owner.seen, owner.last, owner.words = {1}, deque([1], maxlen=2), Counter("a")
    owner.by_mode["self"] = owner.by_mode
    before = dict(vars(owner))

    def count():
        with in_copies(owner):
            assert owner.shared is owner.by_mode["train"]
            assert owner.by_mode["self"] is owner.by_mode
            owner._hidden.append(1)
            owner.shared.append(1)
            owner.by_mode[3]["x"].append(1)
            owner.count += 1
            owner.total += 1
            owner.late, owner.new = [1], 1
            owner.seen.add(2)
            owner.last.append(2)
            owner.words["b"] += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        count()
    assert vars(owner).keys() == before.keys()
    assert all(getattr(owner, name) is value for name, value in before.items())
    assert (owner._hidden, shared, owner.count, owner.total.item(), owner.late) == ([], [], 0, 0.0, None)
    assert owner.by_mode[3] == {}
    assert (owner.seen, list(owner.last), owner.words) == ({1}, [1], Counter("a"))


def test_other_values_are_left_alone():
    weight = torch.ones(3, requires_grad=True)
    values = {
        "touchy": Touchy(a=[1]),
        "fixed": Fixed(a=[1]),
        "user": UserDict(a=[1]),
        "proxy": MappingProxyType({"a": 1}),
        "loss": weight.sum(),
        "weight": weight,
    }
    owner = SimpleNamespace(**values, data=[[1]] * 3)
    with in_copies(owner, without=["data"]):
        assert all(getattr(owner, name) is value for name, value in values.items())
        owner.data.append([2])
    assert len(owner.data) == 4
