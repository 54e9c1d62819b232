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


@pytest.fixture
def choose():
    """A function that sets threads and plan; undone after the test."""
    import rnnfast
    from rnnfast import _kernels, config

    before = rnnfast.get_num_threads(), config.plan

    def choose(threads, plan="auto"):
        rnnfast.set_num_threads(threads)
        config.plan = _kernels.PLANS.index(plan)

    yield choose
    choose(before[0], _kernels.PLANS[before[1]])
