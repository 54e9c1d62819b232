"""The Python API as a citizen of its process: parameters, copies, forks, threads, signals.

Knows the public API. Numbers are judged in test_kernels, bad input in test_bad_input, files in
test_storage, streams in test_stream.
"""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import rnnfast
from rnnfast import functional
from rnnfast.cells import CELLS

CLASSES = (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU)
T, B, I, H = 6, 4, 3, 5


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def bits(result):
    """The bytes of a nest of arrays."""
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.tobytes()
    return [bits(part) for part in result]


def training_step(module, x, seed=1):
    y, state, tape = module.forward_train(x)
    dx, dstate = module.backward(tape, random(*y.shape, dtype=y.dtype, seed=seed))
    return y, state, dx, dstate


def in_child(program, **environment):
    """Runs a program in a fresh interpreter; returns what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cls", "gates"), list(zip(CLASSES, (1, 4, 3), strict=True)))
def test_parameters_have_pytorchs_names_shapes_and_order(cls, gates, bidirectional):
    module = cls(I, H, 2, bidirectional=bidirectional)
    D, G = 1 + bidirectional, gates * H
    want = {}
    for layer in range(2):
        for end in ("", "_reverse")[:D]:
            want[f"weight_ih_l{layer}{end}"] = (G, D * H if layer else I)
            want[f"weight_hh_l{layer}{end}"] = (G, H)
            want[f"bias_ih_l{layer}{end}"] = (G,)
            want[f"bias_hh_l{layer}{end}"] = (G,)
    for arrays in (module.params, module.grads):
        assert {name: array.shape for name, array in arrays.items()} == want
        assert list(arrays) == list(want)
    flat = np.concatenate([array.ravel() for array in module.params.values()])
    assert flat.tobytes() == module.flat.tobytes()
    assert module.flat.ctypes.data % 64 == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_initial_parameters_are_uniform_within_the_bound(cls):
    module = cls(40, 64, seed=1)
    bound = 1 / 8
    assert abs(module.flat).max() <= bound
    assert abs(module.flat).max() > 0.99 * bound
    assert abs(module.flat.mean()) < 0.01 * bound
    assert abs(module.flat.std() - bound / 3**0.5) < 0.02 * bound
    assert bits(cls(40, 64, seed=1).flat) == bits(module.flat)
    assert bits(cls(40, 64, seed=2).flat) != bits(module.flat)
    assert cls(2, 2).seed != cls(2, 2).seed


def test_in_place_updates_take_effect():
    """Each way of changing a parameter changes the next result, and the module's own memory."""
    x = random(T, B, I)
    module = rnnfast.LSTM(I, H, seed=1)

    def by_attribute():
        module.flat -= 0.1

    def by_assignment():
        module.flat = module.flat * 0.5

    def by_item():
        module.params["weight_hh_l0"] += 1

    def by_item_assignment():
        module.params["bias_ih_l0"] = np.ones(4 * H, np.float32)

    def by_element():
        module.params["weight_ih_l0"][0, 0] += 1

    def by_loading():
        module.load_state_dict(rnnfast.LSTM(I, H, seed=2).state_dict())

    flat = module.flat
    for change in (
        by_attribute, by_assignment, by_item, by_item_assignment, by_element, by_loading,
    ):  # fmt: skip
        before = bits(module(x))
        change()
        assert bits(module(x)) != before, change.__name__
        assert module.flat is flat


def test_gradients_add_up_until_zeroed():
    module = rnnfast.GRU(I, H, 2, seed=1)
    x = random(T, B, I)
    training_step(module, x)
    once = module.flat_grads.copy()
    training_step(module, x)
    assert np.array_equal(module.flat_grads, once + once)
    assert once.any()
    assert all(array.base is not None for array in module.grads.values())
    module.zero_grad()
    assert not module.flat_grads.any()


def test_without_dx_the_other_gradients_have_the_same_bits():
    module = rnnfast.LSTM(I, H, 2, bidirectional=True, seed=1)
    x = random(T, B, I)
    y, _, tape = module.forward_train(x)
    _, want = module.backward(tape, y)
    grads = module.flat_grads.copy()
    module.zero_grad()
    dx, got = module.backward(tape, y, need_dx=False)
    assert dx is None
    assert bits(got) == bits(want)
    assert bits(module.flat_grads) == bits(grads)


# ----------------------------------------------------------------------------------------- freeze


@pytest.mark.parametrize("cls", CLASSES)
def test_freezing_changes_no_bit_and_forbids_edits(cls):
    module = cls(I, H, 2, bidirectional=True, seed=1)
    x = random(T, B, I)
    want = bits(module(x)), bits(training_step(module, x)), bits(module.flat_grads)
    module.zero_grad()
    module.freeze()
    assert (bits(module(x)), bits(training_step(module, x)), bits(module.flat_grads)) == want
    flat = module.flat.copy()
    for edit in (
        lambda: module.flat.__isub__(1),
        lambda: setattr(module, "flat", flat),
        lambda: module.params["weight_ih_l0"].fill(0),
        lambda: module.params.__setitem__("weight_ih_l0", module.params["weight_ih_l0"] * 2),
        lambda: module.load_state_dict(module.state_dict()),
    ):
        with pytest.raises(ValueError, match=r"read-only|frozen"):
            edit()
    assert bits(module.flat) == bits(flat)
    module.zero_grad()
    module.freeze()  # again: no effect
    module.unfreeze()
    module.flat += 1
    assert bits(module(x)) != want[0]


def test_a_frozen_module_keeps_its_weights_whatever_happens_to_old_views():
    module = rnnfast.LSTM(I, H, seed=1)
    x = random(T, B, I)
    old = module.params["weight_ih_l0"][0]
    want = bits(module(x))
    module.freeze()
    old += 1
    assert bits(module(x)) == want
    module.unfreeze()
    assert bits(module(x)) != want


def test_another_thread_may_unfreeze_while_backward_packs(monkeypatch):
    """The packs that are made then serve that call, and none after the weights have changed."""
    x = random(T, B, I)
    frozen, plain = (rnnfast.GRU(I, H, 2, seed=1) for _ in range(2))
    want = bits(training_step(plain, x))
    frozen.freeze()
    pack_all = frozen._pack_all

    def as_the_other_thread_has_it(kind):
        packs = pack_all(kind)
        frozen.unfreeze()
        return packs

    monkeypatch.setattr(frozen, "_pack_all", as_the_other_thread_has_it)
    assert bits(training_step(frozen, x)) == want
    for module in (frozen, plain):
        module.flat *= 2
    assert bits(training_step(frozen, x)) == bits(training_step(plain, x))


def test_copies_of_state_are_copies():
    module = rnnfast.LSTM(I, H, seed=1)
    state = module.state_dict()
    before = bits(module.flat)
    for array in state.values():
        array[...] = 0
    assert bits(module.flat) == before


def test_loading_is_all_or_nothing():
    module = rnnfast.LSTM(I, H, seed=1)
    good = {name: array + 1 for name, array in module.state_dict().items()}

    class Breaks:
        def __array__(self, dtype=None, copy=None):
            raise OSError("gone")

    before = bits(module.flat)
    for last in (np.ones(3, np.float32), Breaks(), np.ones(4 * H)):
        with pytest.raises((TypeError, ValueError), match="bias_hh_l0"):
            module.load_state_dict({**good, "bias_hh_l0": last})
        assert bits(module.flat) == before
    # Views of the module itself: read before anything is written.
    module.load_state_dict(dict(module.params))
    assert bits(module.flat) == before


# ----------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_go_their_own_way(cls, copied, frozen):
    module = cls(I, H, 2, dropout=0.5, batch_first=True, seed=1)
    x = random(B, T, I)
    training_step(module, x)
    if frozen:
        module.freeze()
    twin = copied(module)
    assert type(twin) is cls
    assert repr(twin) == repr(module)
    assert bits(twin.flat_grads) == bits(module.flat_grads)
    # With the same masks: the copy continues where the original stands.
    assert bits(training_step(twin, x)) == bits(training_step(module, x))
    twin.unfreeze()
    want = bits(module(x))
    twin.flat += 1
    assert bits(module(x)) == want
    assert bits(twin(x)) != want


def test_a_tape_belongs_to_its_module():
    """Another module of the same sizes would add wrong gradients to its own in silence."""
    module, x = rnnfast.LSTM(I, H, 2, seed=1), random(T, B, I)
    y, _, tape = module.forward_train(x)
    dy = random(*y.shape)
    want = bits(module.backward(tape, dy))
    for copied in (copy.copy, copy.deepcopy, lambda tape: pickle.loads(pickle.dumps(tape))):
        assert bits(module.backward(copied(tape), dy)) == want
    for other in (rnnfast.LSTM(I, H, 2, seed=1), copy.deepcopy(module)):
        before = bits(other.flat_grads)
        with pytest.raises(ValueError, match="tape: got one of another module; needs"):
            other.backward(tape, dy)
        assert bits(other.flat_grads) == before


def test_objects_that_were_never_filled_say_so():
    assert repr(functional.Tape()) == "Tape()"
    never, x = rnnfast.LSTM.__new__(rnnfast.LSTM), random(T, B, I)
    _, _, tape = rnnfast.LSTM(I, H).forward_train(x)
    for use in (
        lambda: never(x), lambda: never.forward_train(x), lambda: never.backward(tape),
        never.stream, never.freeze, never.zero_grad, never.state_dict, lambda: never.flat,
        lambda: never.input_size, lambda: never.dropout_calls, lambda: copy.copy(never),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="module: got one that was never built; needs"):
            use()
    assert not hasattr(never, "something")
    for junk in (None, 3, {}, {"x": 1}, {"arguments": None}, {"arguments": {"input_size": 3}}):
        with pytest.raises((TypeError, ValueError), match="needs"):
            rnnfast.GRU.__new__(rnnfast.GRU).__setstate__(junk)


def test_a_module_is_built_once():
    """Else a call under way would meet other sizes than it has checked."""
    module = rnnfast.LSTM(I, H, seed=1)
    want = bits(module(random(T, B, I)))
    state = rnnfast.LSTM(I, 9 * H).__getstate__()
    for again in (lambda: module.__init__(I, 9 * H), lambda: module.__setstate__(state)):
        with pytest.raises(ValueError, match="LSTM: got a module that is built; needs"):
            again()
        assert bits(module(random(T, B, I))) == want


def test_the_representation_makes_such_a_module():
    for text in (
        "LSTM(3, 5)",
        "RNN(3, 5, num_layers=2, nonlinearity='relu', bias=False)",
        "GRU(3, 5, batch_first=True, dropout=0.5, bidirectional=True, reset_after=False)",
    ):
        assert repr(eval(text, vars(rnnfast))) == text


# ---------------------------------------------------------------------------------------- dropout


def test_each_training_call_has_its_own_masks_and_backward_the_same():
    def run(module, calls=1):
        return [module.forward_train(x)[0] for _ in range(calls)]

    x = random(T, B, I)

    def make():
        return rnnfast.LSTM(I, 64, 2, dropout=0.5, seed=3)

    first, second = run(make(), 2)
    assert bits(first) != bits(second)
    assert bits(run(make(), 2)) == bits([first, second])
    resumed = make()
    resumed.dropout_calls = 1
    assert bits(run(resumed)) == bits([second])
    module = make()
    assert bits(module(x)) == bits(rnnfast.LSTM(I, 64, 2, seed=3)(x))
    assert module.dropout_calls == 0
    module.forward_train(x)
    assert module.dropout_calls == 1
    with pytest.raises(TypeError):
        module.forward_train(x.astype(np.float64))
    assert module.dropout_calls == 1


def test_masks_do_not_depend_on_batch_first():
    x = random(T, B, I)
    plain = rnnfast.GRU(I, 16, 3, dropout=0.3, seed=3)
    swapped = rnnfast.GRU(I, 16, 3, dropout=0.3, batch_first=True, seed=3)
    y, _, _, _ = training_step(plain, x)
    y2, _, _ = swapped.forward_train(x.swapaxes(0, 1))
    assert bits(y2.swapaxes(0, 1).copy()) == bits(y)


# ------------------------------------------------------------------------------------- functional


FUNCTIONS = {
    "rnn_tanh": ("rnn", {}, lambda: rnnfast.RNN(I, H, seed=1)),
    "rnn_relu": ("rnn", {"nonlinearity": "relu"},
                 lambda: rnnfast.RNN(I, H, nonlinearity="relu", seed=1)),
    "lstm": ("lstm", {}, lambda: rnnfast.LSTM(I, H, seed=1)),
    "gru": ("gru", {}, lambda: rnnfast.GRU(I, H, seed=1)),
    "gru_reset_before": ("gru", {"reset_after": False},
                         lambda: rnnfast.GRU(I, H, reset_after=False, seed=1)),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_functions_have_the_modules_bits(cell, packed):
    stem, options, make = FUNCTIONS[cell]
    module = make()
    forward, backward, step = (
        getattr(functional, f"{stem}_{verb}") for verb in ("forward", "backward", "step")
    )
    weights = tuple(module.params.values())
    for_forward, for_backward = weights, weights
    if packed:
        for_forward = functional.pack(cell, weights)
        for_backward = functional.pack(cell, weights, "backward")
    x, dy = random(T, B, I), random(T, B, H, seed=2)
    y, state, tape = forward(x, None, for_forward, lengths=[6, 1, 0, 3], **options)
    want_y, want_state, want_tape = module.forward_train(x, lengths=[6, 1, 0, 3])
    assert bits([y, state]) == bits([want_y, want_state])
    grads = backward(tape, for_backward, dy, None, **options)
    want = module.backward(want_tape, dy)
    assert bits([grads.x, grads.state]) == bits(want)
    assert bits(grads.weights) == bits(list(module.grads.values()))
    no_tape = forward(x, None, for_forward, train=False, **options)
    assert no_tape[2] is None
    assert bits(no_tape[0]) == bits(module(x)[0])

    state, ys = None, []
    for x_t in x:
        state = step(x_t, state, for_forward, **options)
        ys.append(state[0] if cell == "lstm" else state)
    assert bits(np.stack(ys)) == bits(module(x)[0])
    single = step(x[0, 0], None, for_forward, **options)
    first = single[0] if cell == "lstm" else single
    assert bits(first) == bits(ys[0][0])


def test_only_what_is_needed_is_computed():
    weights = random(4 * H, I), random(4 * H, H), random(4 * H), None
    y, _, tape = functional.lstm_forward(random(T, B, I), None, weights)
    everything = functional.lstm_backward(tape, weights, y, None)
    assert everything.weights[3] is None  # there is no such bias
    for need, fields in {
        "x": ["x"], ("state",): ["state"], ("weight_ih", "bias_hh"): [], (): [],
    }.items():  # fmt: skip
        grads = functional.lstm_backward(tape, weights, y, None, need=need)
        for name in ("x", "state"):
            got, want = getattr(grads, name), getattr(everything, name)
            if name in fields:
                assert bits(got) == bits(want)
            else:
                assert got is None
        for name, got, want in zip(
            functional.PARAMETERS, grads.weights, everything.weights, strict=True
        ):
            if name in need and want is not None:
                assert bits(got) == bits(want)
            else:
                assert got is None


def test_a_pair_of_directions_and_the_reversed_one():
    ahead = random(3 * H, I), random(3 * H, H), random(3 * H), random(3 * H)
    back = tuple(array[::-1].copy() for array in ahead)
    x = random(B, T, I)
    options = {"batch_first": True, "lengths": [3, 6, 0, 1]}
    y, h_n, tape = functional.gru_forward(x, None, (ahead, back), **options)
    one, h_one, _ = functional.gru_forward(x, None, ahead, **options)
    two, h_two, tape_two = functional.gru_forward(x, None, back, reverse=True, **options)
    assert bits(y) == bits(np.concatenate([one, two], axis=2))
    assert bits(h_n) == bits(np.concatenate([h_one, h_two]))
    grads = functional.gru_backward(tape, (ahead, back), None, h_n)
    want = functional.gru_backward(tape_two, back, None, h_two)
    assert bits(grads.weights[1]) == bits(want.weights)
    assert grads.x.shape == x.shape


def test_the_tape_says_what_it_holds():
    weights = random(3 * H, I), random(3 * H, H), None, None
    x = random(T, B, I)
    _, _, tape = functional.gru_forward(x, None, weights)
    assert np.shares_memory(tape.x, x)
    assert bits(tape.x) == bits(x)
    assert tape.gates.shape == (1, T, B, len(CELLS["gru"].tape_gates), H)
    assert tape.h.shape == (1, T + 1, B, H)
    assert tape.c is None
    assert tape.plan in ("serial", "batch")
    assert tape.threads >= 1
    assert tape.isa == rnnfast.isa()
    assert "gru" in repr(tape)


def test_results_are_fresh_each_time():
    module = rnnfast.LSTM(I, H, 2, seed=1)
    x = random(T, B, I)
    state = random(2, B, H), random(2, B, H)

    def arrays():
        y, state_n, tape = module.forward_train(x, state)
        dx, dstate = module.backward(tape, y, state)
        tapes = [getattr(one, name) for one in tape.layers for name in ("h", "c", "gates")]
        return [y, *state_n, dx, *dstate], tapes

    (first, first_tape), (second, second_tape) = arrays(), arrays()
    everything = [x, *state, *first, *second, *first_tape, *second_tape]
    for i, a in enumerate(everything):
        for b in everything[:i]:
            assert not np.may_share_memory(a, b)


# --------------------------------------------------------------------------- forks, threads, time


def work(module, x):
    """A call and a training step, as bits."""
    module = copy.deepcopy(module)
    return bits([module(x)[0], *training_step(module, x)[:1]]), bits(module.flat_grads)


LARGE = dict(input_size=64, hidden_size=96, num_layers=2)


def large():
    """Enough work for several threads; says so."""
    module, x = rnnfast.LSTM(**LARGE, seed=1), random(20, 64, 64)
    tape = module.forward_train(x)[2]
    return module, x, tape.threads


def test_the_threads_of_these_tests_are_real():
    if rnnfast.get_num_threads() == 1:
        pytest.skip("one core only")
    assert large()[2] > 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same():
    module, x, _ = large()
    want = work(module, x)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if work(module, x) == want else 2
            finally:
                os._exit(status)
        deadline = time.monotonic() + 60
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError("the child hangs")
            time.sleep(0.005)
        assert os.waitstatus_to_exitcode(status) == 0
        assert work(module, x) == want


FORK_IN_A_HANDLER = """
    import json, os, signal, sys
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads(2)
    module = rnnfast.LSTM(256, 256, seed=1)
    x = np.full((1500, 64, 256), 0.5, np.float32)
    want = module(x)[0][:100].tobytes()
    read, write = os.pipe()
    pids = []

    def handler(*_):
        pids.append(os.fork())

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        y, outcome = module(x)[0], "a result"
    except BaseException as error:
        y, outcome = None, f"{type(error).__name__}: {error}"
    if pids[0] == 0:
        signal.alarm(60)  # a child that hangs is to end
        works = module(x)[0][:100].tobytes() == want
        os.write(write, json.dumps([outcome, works]).encode())
        os._exit(0)
    _, status = os.waitpid(pids[0], 0)
    os.close(write)
    child = json.loads(os.read(read, 10000) or b"null")
    print(json.dumps([y is not None and y[:100].tobytes() == want, status, child]))
"""


def test_a_fork_in_a_signal_handler_during_a_call():
    """The child has none of the call's other threads: that call fails there, and no later one."""
    parent, status, child = in_child(FORK_IN_A_HANDLER)
    assert parent, "the parent's result is another one"
    assert status == 0
    outcome, works = child
    assert outcome.startswith("OSError: the process forked inside this call")
    assert works


def test_many_threads_at_once():
    module, x, _ = large()
    want = work(module, x)
    shared = bits(module(x)[0])
    results, errors = [], []

    def run():
        try:
            for _ in range(5):
                results.append(work(module, x) == want and bits(module(x)[0]) == shared)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert not errors
    assert results == [True] * 40


def test_backward_of_one_module_from_many_threads_adds_everything():
    module, x, _ = large()
    y, _, tape = module.forward_train(x)
    module.backward(tape, y)
    once = module.flat_grads.copy()
    module.zero_grad()
    threads = [threading.Thread(target=module.backward, args=(tape, y)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Adding up is NumPy's, in the interpreter's lock: nothing is lost.
    np.testing.assert_allclose(module.flat_grads, 4 * once, rtol=1e-5, atol=1e-5)


INTERRUPTED = """
    import json, os, signal, threading, time
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads({threads})
    # Many operations for each number that is stored: some seconds of work without gigabytes.
    module = rnnfast.LSTM(512, 512, 2, bidirectional={bidirectional}, seed=1)
    x = np.broadcast_to(np.full(512, 0.5, np.float32), ({steps}, 8, 512))
    dy = np.broadcast_to(np.ones(1024, np.float32), ({steps}, 8, 1024))
    tape = None
    if {name!r} == "backward":
        _, _, tape = module.forward_train(x)
    elif {name!r} == "process":
        stream = module.stream(8)
        before_state = [a.tobytes() for a in stream.state]
    module.flat_grads += 1
    before = module.flat.tobytes(), module.flat_grads.tobytes()
    calls = {{
        "call": lambda: module(x),
        "forward_train": lambda: module.forward_train(x),
        "backward": lambda: module.backward(tape, dy),
        "process": lambda: stream.process(x),
    }}
    sent = []
    own = time.pthread_getcpuclockid(threading.main_thread().ident)

    def clocks():
        return time.clock_gettime(own), time.monotonic()

    def interrupt():
        time.sleep(0.3)
        sent.extend(clocks())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        calls[{name!r}]()
        waited = None
    except KeyboardInterrupt:
        waited = [now - then for now, then in zip(clocks(), sent)]
    same = (module.flat.tobytes(), module.flat_grads.tobytes()) == before
    if {name!r} == "process":
        same = same and [a.tobytes() for a in stream.state] == before_state
    y, _ = module(np.ones((3, 2, 512), np.float32))
    print(json.dumps([waited, same, bool(np.isfinite(y).all())]))
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["call", "forward_train", "backward", "process"])
def test_ctrl_c_ends_a_long_call_and_changes_nothing(name, threads):
    program = INTERRUPTED.format(
        name=name,
        threads=threads,
        steps=1000 if name in ("forward_train", "backward") else 10_000,
        bidirectional=name != "process",
    )
    waited, same, works = in_child(program)
    assert waited is not None, "the call ended before it was interrupted"
    assert same, "an interrupted call changed weights, gradients or states"
    assert works
    own, wall = waited
    # A quarter second of the thread's own time: others may be using the machine.
    assert own <= 0.25, f"took {own:.3f} s of its own, {wall:.3f} s in all"
    assert wall <= 5, f"took {own:.3f} s of its own, {wall:.3f} s in all"


# ---------------------------------------------------------------------------- the host's settings


HOST = """
    import ctypes, json, signal, sys, threading
    import numpy as np

    libm = ctypes.CDLL(None)

    def mode():
        \"\"\"Rounding, and whether denormals live, in this thread.\"\"\"
        tiny = np.float32(1e-40)
        halves = np.array([tiny, 3e-39], np.float32) * np.array([1.0, 0.25], np.float32)
        return [libm.fegetround(), halves.tolist(), (np.array([5e-324]) * 1.0).tolist()]

    def settings():
        handlers = [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())]
        mask = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        return [mode(), handlers, mask, np.geterr(), sys.getswitchinterval()]

    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    before = settings()
    import rnnfast
    imported = settings()
    module = rnnfast.LSTM(64, 96, 2, seed=1)
    module.flat *= 1e-3
    x = np.full((20, 64, 64), 1e-39, np.float32)  # denormals, so that flushing would show
    _, _, tape = module.forward_train(x)
    module.backward(tape, np.full((20, 64, 96), 1e-39, np.float32))
    module.stream(64).step(x[0])
    called = settings()
    in_thread = []
    thread = threading.Thread(target=lambda: (module(x), in_thread.append(mode())))
    thread.start()
    thread.join()
    print(json.dumps([before == imported, before == called, in_thread == [before[0]]]))
"""


def test_the_hosts_settings_stay():
    assert in_child(HOST) == [True, True, True]


HANDLER_MODE = """
    import json, signal
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads({threads})
    module = rnnfast.LSTM(512, 512, seed=1)
    x = np.full((600, 8, 512), 0.5, np.float32)
    least, small, least_32 = [5e-324], [2.3e-308], np.array([1e-45], np.float32)
    calling, seen = False, []

    def handler(*_):
        if calling:
            live = least[0] * 1.0 != 0, small[0] / 2 != 0, bool((least_32 * np.float32(1) != 0)[0])
            seen.append(all(live))

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    while len(seen) < 10:
        calling = True
        _, _, tape = module.forward_train(x)
        module.backward(tape, x)
        calling = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(all(seen)))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_handler_during_a_call_sees_the_hosts_floating_point_mode(threads):
    """Kernels flush denormals; Python code that runs in the midst of one must not."""
    assert in_child(HANDLER_MODE.format(threads=threads))


IMPORT = """
    import json, sys, time
    import numpy
    before = set(sys.modules)
    start = time.perf_counter()
    import rnnfast
    took = time.perf_counter() - start
    print(json.dumps([took, sorted(set(sys.modules) - before)]))
"""


WITHOUT_COMPILED = """
    import json, sys
    import numpy
    # Without the finder of an editable install, which would find the module of its own tree.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("_f")
                        or "importlib" in getattr(f, "__module__", "")]
    sys.path.insert(0, {folder!r})
    try:
        import rnnfast
        print(json.dumps("imported"))
    except ImportError as error:
        print(json.dumps(str(error)))
"""


def test_a_tree_that_was_not_built_says_so(tmp_path):
    sources = Path(rnnfast.__file__).parent
    (tmp_path / "rnnfast").mkdir()
    for source in sources.glob("*.py"):
        shutil.copy(source, tmp_path / "rnnfast")
    message = in_child(WITHOUT_COMPILED.format(folder=str(tmp_path)))
    assert "compiled module is missing in" in message
    assert str(tmp_path) in message
    assert "pip install -e ." in message


def test_importing_is_quick():
    """At most 60 ms more than NumPy; the test grants a busy machine the double."""
    took, modules = min(in_child(IMPORT) for _ in range(5))
    print(f"import rnnfast: {1000 * took:.1f} ms above numpy, {len(modules)} modules")
    assert took < 0.12
    heavy = {"zipfile", "json", "tempfile", "pickle", "rich", "torch", "matplotlib", "subprocess"}
    assert not heavy.intersection(modules) - {"json"}  # the program itself imports json


# ------------------------------------------------------------------------------------- no memory


MEMORY = """
    import json, resource
    import numpy as np
    import rnnfast

    module = rnnfast.LSTM(32, 64, 2, seed=1)
    small = np.ones((3, 2, 32), np.float32)
    want = module(small)[0].tobytes()
    _, _, tape = module.forward_train(np.broadcast_to(np.ones(32, np.float32), (1000, 64, 32)))
    stream = module.stream(64)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**23, resource.RLIM_INFINITY))
    x = np.broadcast_to(np.ones(32, np.float32), (1000, 64, 32))
    failed = []
    module.flat_grads += 1
    for call in (
        lambda: module(x),
        lambda: module.forward_train(x),
        lambda: module.backward(tape, np.broadcast_to(np.ones(64, np.float32), (1000, 64, 64))),
        lambda: stream.process(x),
        lambda: rnnfast.LSTM(4096, 4096),
        lambda: module.stream(2**20),
    ):
        try:
            call()
            failed.append("no error")
        except MemoryError:
            failed.append("MemoryError")
        assert module(small)[0].tobytes() == want
        assert stream.step(np.ones((64, 32), np.float32)).shape == (64, 64)
    print(json.dumps([failed, bool((module.flat_grads == 1).all())]))
"""


def test_a_failed_allocation_is_a_memory_error_and_the_next_call_works():
    failed, same = in_child(MEMORY)
    assert failed == ["MemoryError"] * 6
    assert same


# -------------------------------------------------------------------------------------- settings


def test_threads_can_be_set():
    before = rnnfast.get_num_threads()
    try:
        for n in (1, 2, 7, 256):
            rnnfast.set_num_threads(n)
            assert rnnfast.get_num_threads() == n
        module, x = rnnfast.LSTM(I, H, seed=1), random(T, B, I)
        want = bits(module(x))
        rnnfast.set_num_threads(1)
        assert bits(module(x)) == want
        assert module.forward_train(x)[2].threads == 1
    finally:
        rnnfast.set_num_threads(before)


SETTINGS = """
    import json, rnnfast
    found = rnnfast.show_config("dicts")
    _, _, tape = rnnfast.LSTM(64, 96).forward_train(__import__("numpy").ones((9, 64, 64), "f"))
    print(json.dumps([rnnfast.isa(), found["plan"], found["threads"], tape.plan, tape.isa]))
"""


def test_the_environment_is_obeyed():
    settings = {"RNNFAST_ISA": "base", "RNNFAST_PLAN": "serial", "RNNFAST_NUM_THREADS": "3"}
    assert in_child(SETTINGS, **settings) == ["base", "serial", 3, "serial", "base"]
    empty = in_child(SETTINGS, **dict.fromkeys(settings, ""))
    assert empty[1] == "auto"
    assert empty[2] == len(os.sched_getaffinity(0))
    forced = in_child(SETTINGS, RNNFAST_PLAN="batch", RNNFAST_NUM_THREADS="2")
    assert forced[3] == "batch"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RNNFAST_ISA", ["avx1024", "AVX2", "neon?", " "]),
        ("RNNFAST_PLAN", ["wavefront", "Auto", "0"]),
        ("RNNFAST_NUM_THREADS", ["0", "-1", "two", "1.0", "257", "9" * 30, "1e2", "\u0663", "+1"]),
    ],
)
def test_an_impossible_environment_is_a_clear_error(name, values):
    for value in values:
        done = subprocess.run(
            [sys.executable, "-c", "import rnnfast"],
            capture_output=True,
            text=True,
            env={**os.environ, name: value},
        )
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"ValueError: {name}: got "), done.stderr
        assert "needs" in last


def test_the_configuration_is_shown(capsys):
    assert rnnfast.show_config() is None
    shown = capsys.readouterr().out
    found = rnnfast.show_config("dicts")
    assert found["isa"] in found["isas"]
    for key, value in found.items():
        assert key in shown
        assert str(value if isinstance(value, (str, int)) else value[0]) in shown
