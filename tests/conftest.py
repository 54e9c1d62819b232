"""Fixtures of all tests. Knows pytest and the compiled layer's switches; leaves cases to `cases`.

The reference's own tests run without the compiled layer: it is imported only when asked for.
"""

import pytest


@pytest.fixture
def use_isa():
    """A function that makes an isa current for the test, or skips it by name."""
    from rnnfast import _kernels

    def choose(name):
        if not _kernels.set_isa(name):
            pytest.skip(f"this CPU cannot run {name}")

    yield choose
    assert _kernels.set_isa("auto")
