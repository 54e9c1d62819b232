"""Blocks of memory that are kept when given back (csrc/memory.c), as _kernels offers them.

What lies in them is the kernels' matter; here only that nobody else has the same bytes.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import rnnfast
from rnnfast import _kernels

MIB = 2**20
KEPT = 512 * MIB  # RF_KEPT_BYTES of csrc/memory.h

sanitized = pytest.mark.skipif(
    bool(os.environ.get("RNNFAST_SANITIZE")), reason="nothing is kept under a sanitizer"
)


def address(memory):
    return np.frombuffer(memory, np.uint8).ctypes.data


@sanitized
def test_a_block_given_back_is_the_next_one():
    _kernels.release_memory()
    memory = _kernels.Memory(3 * MIB)
    first = address(memory)
    assert first % 64 == 0
    del memory
    assert address(_kernels.Memory(3 * MIB - 5)) == first
    assert _kernels.release_memory() >= 3 * MIB
    assert _kernels.release_memory() == 0


@sanitized
def test_what_is_kept_is_bounded():
    _kernels.release_memory()
    for nbytes in (160 * MIB, 200 * MIB, 240 * MIB, 280 * MIB, 2 * KEPT):
        assert len(memoryview(_kernels.Memory(nbytes))) == nbytes
    assert 0 < _kernels.release_memory() <= KEPT
    blocks = [_kernels.Memory(70_000) for _ in range(100)]
    del blocks
    assert 0 < _kernels.release_memory() < 40 * 2 * 70_000


def test_a_block_lives_as_long_as_an_array_in_it():
    array = np.ndarray((1000, 100), np.float32, _kernels.Memory(400_000))
    array[...] = 7
    part = array[10:20]
    del array
    others = [_kernels.Memory(400_000) for _ in range(3)]
    for other in others:
        np.frombuffer(other, np.uint8)[...] = 0xFF
    assert (part == 7).all()


def test_results_of_one_call_outlive_the_next():
    lstm = rnnfast.LSTM(32, 64, seed=0)
    x = np.random.default_rng(0).standard_normal((50, 16, 32), dtype=np.float32)
    first = lstm(x)[0]
    assert first.nbytes > 64 * 1024  # large enough to lie in a kept block
    copy = first.copy()
    for _ in range(3):
        lstm(-x)
    np.testing.assert_array_equal(first, copy)


def test_threads_never_share_a_block():
    def churn(number):
        random = np.random.default_rng(number)
        held = []
        for _ in range(300):
            memory = _kernels.Memory(int(random.integers(65_536, MIB)))
            bytes_ = np.frombuffer(memory, np.uint8)
            bytes_[::4096] = number
            held.append(bytes_)
            if len(held) > 4:
                assert (held.pop(int(random.integers(4)))[::4096] == number).all()
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(churn, range(1, 5)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("nbytes", [2**62, sys.maxsize])
def test_too_much_is_a_memory_error(nbytes):
    with pytest.raises(MemoryError):
        _kernels.Memory(nbytes)


def test_none_at_all_is_an_empty_buffer():
    assert len(memoryview(_kernels.Memory(0))) == 0
