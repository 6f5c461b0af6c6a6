"""Mutated delta and child files make the right model, or raise ValueError or OSError and leave the model as it was."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutated_files import Files, check_bytes, check_contents

every_time_the_same = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def refused():
    """Whether each file was refused: some must be and some not, or the mutations were too mild or too wild."""
    found = []
    yield found
    assert 0 < sum(found) < len(found)


@settings(every_time_the_same, max_examples=1200)
@given(st.data())
def test_contents_with_the_right_digest(files, refused, data):
    refused.append(check_contents(files, lambda n: data.draw(st.integers(0, n - 1))))


@settings(every_time_the_same, max_examples=400)
@given(st.data())
def test_bytes(files, refused, data):
    refused.append(check_bytes(files, lambda n: data.draw(st.integers(0, n - 1))))
