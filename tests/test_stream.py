"""Streams: the bits of a whole call, step by step or in blocks; states, outputs, independence.

Knows the public API. Bad input to streams is in test_bad_input.
"""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from test_process import in_child

import rnnfast

CLASSES = (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU)
T, B, I, H = 23, 3, 5, 6


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def make(cls, dtype=np.float32, **options):
    module = cls(I, H, 2, dtype=dtype, seed=1, **options)
    x = np.random.default_rng(2).normal(size=(T, B, I)).astype(dtype)
    return module, x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("chunks", [[1] * T, [T], [4, 1, 1, 10, 7], [0, T, 0]], ids=len)
def test_any_chunking_has_the_bits_of_one_call(cls, dtype, chunks):
    module, x = make(cls, dtype)
    want, state_n = module(x)
    stream = module.stream(B)
    start, ys = 0, []
    for steps in chunks:
        block = x[start : start + steps]
        ys.append(stream.step(block[0])[None] if steps == 1 else stream.process(block))
        start += steps
    assert np.concatenate(ys).tobytes() == want.tobytes()
    for got, last in zip(parts(stream.state), parts(state_n), strict=True):
        assert got.tobytes() == last.tobytes()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_single_row_comes_with_or_without_its_axis(cls):
    module, x = make(cls)
    row = x[:, 0]
    want, _ = module(row)
    with_axis, without = module.stream(), module.stream()
    for x_t, y_t in zip(row, want, strict=True):
        got = without.step(x_t)
        assert got.shape == (H,)
        assert got.tobytes() == y_t.tobytes()
        got = with_axis.step(x_t[None])
        assert got.shape == (1, H)
        assert got.tobytes() == y_t.tobytes()
    without.reset()
    with_axis.reset()
    assert without.process(row).tobytes() == want.tobytes()
    assert with_axis.process(row[:, None]).tobytes() == want.tobytes()
    assert without.process(row).shape == (T, H)
    assert with_axis.process(row[:, None]).shape == (T, 1, H)


def test_results_may_be_kept():
    module, x = make(rnnfast.LSTM)
    stream = module.stream(B)
    kept = [stream.step(x_t) for x_t in x]
    assert np.stack(kept).tobytes() == module(x)[0].tobytes()


def test_with_out_nothing_is_allocated():
    module, x = make(rnnfast.LSTM)
    stream = module.stream(B)
    out = np.empty((B, H), np.float32)
    rows = list(x)
    want = module(x)[0]
    for x_t, y_t in zip(rows, want, strict=True):
        assert stream.step(x_t, out) is out
        assert out.tobytes() == y_t.tobytes()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for x_t in rows:
        stream.step(x_t, out)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Nothing stays; what came and went is smaller than an array.
    assert after - before < 100
    assert peak - before < out.nbytes + 200


@pytest.mark.parametrize("cls", CLASSES)
def test_the_state_is_a_copy_both_ways(cls):
    module, x = make(cls)
    stream = module.stream(B)
    stream.process(x[:10])
    saved = stream.state
    assert [a.shape for a in parts(saved)] == [(2, B, H)] * len(parts(saved))
    rest = stream.process(x[10:])
    for array in parts(stream.state):
        array[...] = 99  # a copy: has no effect
    given = tuple(a.copy() for a in parts(saved))
    stream.state = given if cls is rnnfast.LSTM else given[0]
    for array in given:
        array[...] = 99
    assert stream.process(x[10:]).tobytes() == rest.tobytes()
    stream.reset()
    assert not any(array.any() for array in parts(stream.state))
    assert stream.process(x).tobytes() == module(x)[0].tobytes()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_module_continues_a_stream(cls):
    """The states have the shapes of a module's, so they pass between both."""
    module, x = make(cls)
    stream = module.stream(B)
    stream.process(x[:10])
    y, _ = module(x[10:], stream.state)
    assert y.tobytes() == module(x)[0][10:].tobytes()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_stream_is_deaf_to_later_edits(frozen):
    module, x = make(rnnfast.GRU)
    want = module(x)[0]
    if frozen:
        module.freeze()
    stream = module.stream(B)
    module.unfreeze()
    module.flat *= 2
    assert stream.process(x).tobytes() == want.tobytes()
    assert module.stream(B).process(x).tobytes() != want.tobytes()


def test_streams_of_one_module_are_apart():
    module, x = make(rnnfast.LSTM)
    want = module(x)[0]
    first, second = module.stream(B), module.stream(B)
    for t, x_t in enumerate(x):
        assert first.step(x_t).tobytes() == want[t].tobytes()
        if t % 2:
            assert second.step(x[t // 2]).tobytes() == want[t // 2].tobytes()


def test_a_stream_outlives_its_module():
    module, x = make(rnnfast.LSTM)
    want = module(x)[0]
    stream = module.stream(B)
    del module
    assert stream.process(x).tobytes() == want.tobytes()


def test_options_that_a_stream_does_not_know_do_no_harm():
    """batch_first is about sequences, dropout about training: a step has neither."""
    module, x = make(rnnfast.LSTM, batch_first=True, dropout=0.5)
    want, _ = module(x.transpose(1, 0, 2))
    assert module.stream(B).process(x).tobytes() == want.transpose(1, 0, 2).copy().tobytes()


def test_after_an_error_the_states_are_as_before():
    module, x = make(rnnfast.LSTM)
    stream = module.stream(B)
    stream.process(x[:5])
    before = [a.tobytes() for a in stream.state]
    for call in (
        lambda: stream.step(x[0, :, :-1]),
        lambda: stream.step(x[0].astype(np.float64)),
        lambda: stream.process(x[:, :-1]),
        lambda: stream.process(x, np.empty((T, B, H + 1), np.float32)),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert [a.tobytes() for a in stream.state] == before


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__
)
def test_a_stream_cannot_be_copied(copied):
    """Two streams would share one place for their states."""
    stream = rnnfast.LSTM(I, H).stream()
    with pytest.raises(TypeError, match=r"stream: got .* copy .* needs"):
        copied(stream)


# ------------------------------------------------------------------------------- used twice at once

MANY_THREADS = """
    import json, sys, threading, time
    import numpy as np
    import rnnfast

    sys.setswitchinterval(1e-5)
    module = rnnfast.LSTM(64, 64, 2, seed=1)
    x = np.random.default_rng(2).normal(size=(64, 64)).astype(np.float32)
    STEPS = 300
    reference = module.stream(64)
    states, ys = [bytes(2 * 2 * 64 * 64 * 4)], []
    for _ in range(STEPS + 4):
        ys.append(reference.step(x).tobytes())
        states.append(b"".join(a.tobytes() for a in reference.state))
    stream = module.stream(64)
    done, seen, refused, wrong = [], [], [], []
    deadline = time.monotonic() + 60

    def use(work, results):
        while len(done) < STEPS and time.monotonic() < deadline:
            try:
                results.append(work())
            except ValueError as error:
                refused.append(1)
                time.sleep(1e-5)  # or the refused keep the one that works from the lock
                if "in use by another call" not in str(error):
                    wrong.append(str(error))

    def step():
        given = x.copy()  # its memory is free for others after the call
        return stream.step(given).tobytes()

    def process():
        return stream.process(x.copy()[None]).tobytes()

    def look():
        return b"".join(a.tobytes() for a in stream.state)

    threads = [
        threading.Thread(target=use, args=args)
        for args in ((step, done), (step, done), (process, done), (look, seen))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    right = sorted(done) == sorted(ys[: len(done)]) and set(seen) <= set(states)
    print(json.dumps([right, wrong[:3], len(done) >= STEPS, len(refused) > 0]))
"""


def test_threads_that_share_a_stream_get_right_results_or_an_error():
    """Every call that is not refused is one whole step; no state is seen half written."""
    assert in_child(MANY_THREADS) == [True, [], True, True]


DURING_A_CALL = """
    import json, signal, threading, time
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads({threads})
    module = rnnfast.LSTM(256, 256, 2, seed=1)
    x = np.random.default_rng(2).normal(size=(1000, 16, 256)).astype(np.float32)
    start = time.monotonic()
    want = module.stream(16).process(x).tobytes()
    took = time.monotonic() - start
    stream = module.stream(16)
    outcomes = []

    uses = (
        lambda: stream.step(np.ones((16, 256), np.float32)),
        lambda: stream.process(np.ones((2, 16, 256), np.float32)),
        lambda: stream.state,
        lambda: setattr(stream, "state", (np.ones((2, 16, 256), np.float32),) * 2),
        stream.reset,
    )

    def use(*_):
        for call in uses:
            try:
                call()
                outcomes.append("done")
            except ValueError as error:
                outcomes.append(str(error))

    if {handler}:
        signal.signal(signal.SIGALRM, use)
        signal.setitimer(signal.ITIMER_REAL, took / 3)
    else:
        threading.Timer(took / 3, use).start()
    same = stream.process(x).tobytes() == want
    print(json.dumps([same, outcomes]))
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("who", ["thread", "signal handler"])
def test_during_a_call_every_other_use_is_refused(who, threads):
    program = DURING_A_CALL.format(handler=who == "signal handler", threads=threads)
    same, outcomes = in_child(program)
    assert len(outcomes) == 5
    assert all("stream: in use by another call" in outcome for outcome in outcomes), outcomes
    assert same, "a refused use changed the result"
