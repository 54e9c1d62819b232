"""A small set for pytest-benchmark: calls that must not get slower unseen. Run by hand.

Knows the public API, and the reference by way of `measure`. `pytest bench/smoke.py` in a checkout,
`pytest --pyargs rnnfast.bench.smoke` elsewhere; `--benchmark-compare` and its kin are the
plugin's. CI runs it nowhere: on a shared machine times decide nothing.
"""

import pytest

from rnnfast.bench.libraries.ours import Ours
from rnnfast.bench.measure import SEED, check, expected
from rnnfast.bench.shapes import problem, shape_of

CALLS = [
    ("lstm-i8-h16-b1-t1", "inference"),
    ("lstm-i8-h16-b1-t100", "stream"),
    ("lstm-i64-h64-b64-t100", "inference"),
    ("lstm-i64-h64-b64-t100", "training"),
    ("lstm-i256-h256-b1-t150", "inference"),
    ("lstm-i256-h256-b32-t64", "inference"),
    ("gru-i128-h128-b32-t100-l2-bi-uneven", "training"),
]


@pytest.mark.parametrize(("name", "mode"), CALLS)
def test_call(benchmark, name, mode):
    shape = shape_of(name)
    call, arrays = Ours(threads=1).prepare(shape, mode, problem(shape, SEED))
    check(arrays(call()), expected(shape, mode), shape.dtype)
    benchmark(call)
