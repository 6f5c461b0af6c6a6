"""Trainers collect garbage at every training: in a process of many tests it would take half a second each time."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _what_came_before_is_no_garbage():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
