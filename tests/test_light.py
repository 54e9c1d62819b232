"""Memory in training: what a full tape takes, what a light one takes, and that it costs no bit.

Knows the public API and the compiled layer's sizes. What a full tape's gradients are is judged in
test_kernels; here they are the truth, to the bit.
"""

import copy
import itertools
import math
import os
import pickle
import sys
from functools import partial

import numpy as np
import pytest
from cases import (
    DIRECTIONS,
    DTYPES,
    LENGTHS,
    Case,
    Shape,
    make_inputs,
    make_module,
    options_of,
    own_options,
    pack_of,
    past_lengths,
)
from test_api import bits, in_child, random

import rnnfast
from rnnfast import _kernels, functional
from rnnfast.cells import CELLS, PARAMETERS

# T, B, I, H: panels of 128, 16, 3 and 1 steps in a sum over time, so that slices come out as one of
# these or as a few.
SHAPES = Shape(300, 1, 3, 5), Shape(90, 8, 5, 70), Shape(40, 33, 9, 6), Shape(9, 150, 4, 3)


def functions_of(cell):
    """The forward and the backward function of a cell, and its options for the former."""
    kind, options = options_of(cell)
    forward, backward = (getattr(functional, f"{kind}_{verb}") for verb in ("forward", "backward"))
    return forward, backward, options


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of the root of T steps even where that makes them tiny."""
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 0)


def as_argument(states):
    """A tuple of states as the functions want it."""
    return states if states is None or len(states) == 2 else states[0]


def run(case, kind, need=functional.NEEDS, packed=False):
    """All results of a case, by the public functions, and its tape."""
    given = make_inputs(case)
    forward, backward, options = functions_of(case.cell)
    weights = given.weights if case.directions == 2 else given.weights[0]
    packs = [pack_of(case.cell, weights, way) for way in ("forward", "backward")]
    used = packs if packed else (weights, weights)
    y, state, tape = forward(
        given.x, as_argument(given.state), used[0], lengths=given.lengths, tape=kind,
        reverse=case.direction == "reverse", **options,
    )  # fmt: skip
    how = own_options(case.cell)
    back = partial(backward, tape, used[1], given.dy, as_argument(given.dstate), **how)
    grads = back(need=need)
    results = {"y": y, "state": state, "dx": grads.x, "dstate": grads.state}
    return {**results, "weights": grads.weights}, tape, back


def same_bits(got, want, context):
    for name, value in want.items():
        for i, (a, b) in enumerate(zip(flat(got[name]), flat(value), strict=True)):
            same = b is None if a is None else a.tobytes() == b.tobytes() and a.shape == b.shape
            assert same, f"{name} [{i}] differs: {context}"


def flat(value):
    if not isinstance(value, tuple):
        return [value]
    return [array for part in value for array in flat(part)]


# ------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits(cell, direction, dtype, isa, use_isa, choose, small_slices):
    """Cells, directions, lengths, dtypes, isas, threads: y, states and all gradients."""
    use_isa(isa)
    for shape, lengths in itertools.product(SHAPES, LENGTHS):
        case = Case(cell, shape, direction, dtype, lengths)
        choose(1)
        want, _, _ = run(case, "full")
        for threads, plan in ((1, "auto"), (2, "batch"), (3, "batch"), (3, "units")):
            choose(threads, plan)
            got, tape, _ = run(case, "light")
            assert tape.gates is None and tape.steps > 0
            if lengths in ("none", "uneven"):  # where the longest row has all steps, or many
                assert len(tape.h) > 1, "one slice alone tests nothing"
            if plan == "batch" and shape.B > 1 and lengths == "none":
                assert (tape.plan, tape.threads) == ("batch", threads)
            if plan == "units" and shape.H == 70:  # more than a group of units
                assert tape.plan == ("batch" if CELLS[cell].norms else "units")
            same_bits(got, want, f"{case}; {isa=} {threads=} {plan=}")


@pytest.mark.parametrize("need", [*functional.NEEDS, ("x", "bias_ih"), ()])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_asked_for_alone(cell, direction, need, small_slices):
    case = Case(cell, SHAPES[2], direction, lengths="with zero", loss="y", initial=False)
    if need in PARAMETERS and need not in case.parameters:
        with pytest.raises(ValueError, match=r"^need: got '(weight|bias)_"):
            run(case, "full", need)
        return
    want, _, _ = run(case, "full", need)
    got, _, _ = run(case, "light", need, packed=True)
    if set(CELLS[cell].parameters()) & set((need,) if isinstance(need, str) else need):
        want.pop("weights")  # of packed weights, functions cannot tell which are missing
        got.pop("weights")
    same_bits(got, want, f"{case}; {need=}")


@pytest.mark.parametrize("loss", ["y", "state"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_without_one_loss_or_biases(cell, bias, loss, small_slices):
    case = Case(cell, SHAPES[1], "bidirectional", loss=loss, bias=bias, lengths="uneven")
    same_bits(run(case, "light")[0], run(case, "full")[0], case)


def test_slices_of_the_usual_size(choose):
    """As they come, with no size set for the test: some megabytes, so several slices."""
    choose(2)
    case = Case("lstm", Shape(200, 16, 30, 64), "bidirectional", lengths="uneven")
    got, tape, _ = run(case, "light")
    assert len(tape.h) > 2
    same_bits(got, run(case, "full")[0], case)


@pytest.mark.parametrize("cell", CELLS)
def test_a_light_tape_may_be_used_again(cell, small_slices):
    """Backward twice: the same, and the tape is not written."""
    first, tape, back = run(Case(cell, SHAPES[1], "bidirectional", lengths="uneven"), "light")
    before = bits([a for a in (tape.h, tape.c) if a is not None])
    again = back()
    assert before == bits([a for a in (tape.h, tape.c) if a is not None])
    got = {"dx": again.x, "dstate": again.state, "weights": again.weights}
    same_bits(got, {name: first[name] for name in got}, cell)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", ["time first", "batch first", "unbatched"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_modules(cell, dtype, layout, frozen, small_slices):
    """Layers, both directions, dropout, lengths, layouts: gradients through the whole stack."""
    T, B, I, H = 70, 1 if layout == "unbatched" else 6, 7, 9
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, B, I)).astype(dtype)
    lengths = None if layout == "unbatched" else rng.integers(0, T + 1, B)
    x[past_lengths(lengths, T, B)] = np.nan
    if layout == "batch first":
        x = np.ascontiguousarray(x.swapaxes(0, 1))
    elif layout == "unbatched":
        x = x[:, 0]
    module = make_module(
        cell, I, H, 3, bidirectional=True, dropout=0.3, dtype=dtype, seed=1,
        batch_first=layout == "batch first",
    )  # fmt: skip
    if frozen:
        module.freeze()
    results = []
    for kind in ("full", "light", "light"):
        module.dropout_calls = 5
        module.zero_grad()
        y, state, tape = module.forward_train(x, lengths=lengths, tape=kind)
        assert module.dropout_calls == 6
        dx, dstate = module.backward(tape, random(*y.shape, dtype=dtype), state)
        results.append([y, *flat(state), dx, *flat(dstate), module.flat_grads.copy()])
    assert bits(results[1]) == bits(results[0])
    assert bits(results[2]) == bits(results[0])


def test_copies_of_a_light_tape():
    """As of a full one; but a pack of weights is for one machine, and is not pickled."""
    module, x = rnnfast.LSTM(3, 5, 2, seed=1), random(6, 4, 3)
    y, _, tape = module.forward_train(x, tape="light")
    want = bits(module.backward(tape, y))
    for copied in (copy.copy, copy.deepcopy):
        assert bits(module.backward(copied(tape), y)) == want
    with pytest.raises(TypeError, match="a pack cannot be pickled"):
        pickle.dumps(tape)


def test_the_tape_keeps_its_own_weights():
    """What backward computes again is what forward computed, whatever became of the weights."""
    module, x = rnnfast.GRU(3, 5, seed=1), random(300, 4, 3)
    results = []
    for kind in ("full", "light"):
        module.flat *= 1 if kind == "full" else 2  # back to what it was
        y, _, tape = module.forward_train(x, tape=kind)
        module.flat *= 0.5
        results.append(bits(module.backward(tape, np.ones_like(y))))
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------- memory


@pytest.fixture
def scratch(monkeypatch):
    """Bytes of every array that the functions make, in order."""
    made, new_array = [], rnnfast.layer.new_array

    def counted(shape, dtype):
        array = new_array(shape, dtype)
        made.append(array.nbytes)
        return array

    monkeypatch.setattr("rnnfast.layer.new_array", counted)
    return made


def packs_of(cell, I, H, dtype=np.float32):
    weights = tuple(np.zeros(shape, dtype) for shape in CELLS[cell].weight_shapes(I, H).values())
    return [pack_of(cell, weights, kind) for kind in ("forward", "backward")]


@pytest.mark.parametrize("cell", CELLS)
def test_a_full_tape(cell, scratch):
    """An LSTM's takes 6H (1 + 1/T) numbers for each (t, b) at most, others less; y comes on top."""
    T, B, I, H = 50, 4, 8, 16
    forward, backward, options = functions_of(cell)
    packs = packs_of(cell, I, H)
    y, _, tape = forward(random(T, B, I), None, packs[0], **options)
    assert sum(scratch) == y.nbytes + tape.nbytes
    most = 10 if CELLS[cell].norms else 6  # W x and R h, and not the gates made of them
    assert tape.nbytes <= 4 * T * B * most * H * (1 + 1 / T)
    scratch.clear()
    grads = backward(tape, packs[1], y, None, need=CELLS[cell].parameters(), **own_options(cell))
    assert grads.x is None and sum(scratch) == 0


@pytest.mark.parametrize("cell", CELLS)
def test_workspaces_do_not_grow_with_time(cell):
    for packed, threads in itertools.product(packs_of(cell, 30, 40), (1, 4)):
        sizes = [_kernels.workspace(packed, T, 8, threads) for T in (10**4, 10**6, 10**9)]
        assert sizes[0] == sizes[1] == sizes[2] > 0
        # Nor beyond a few megabytes, of which the most is the rows of a chunk of steps.
        assert sizes[0] < 4e6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_light_tape_grows_with_the_root(cell, direction, dtype, scratch, small_slices):
    """Between the calls, and in backward: the tape, the scratch of one slice."""
    B, I, H = 32, 2, 8
    D, states = (2 if direction == "bidirectional" else 1), len(CELLS[cell].states)
    forward, backward, options = functions_of(cell)
    for T in (4**4, 4**5, 4**6):
        root = math.isqrt(T)  # a multiple of the 4 steps of a panel
        case = Case(cell, Shape(T, B, I, H), direction, dtype)
        given = make_inputs(case)
        weights = given.weights if D == 2 else given.weights[0]
        packed = pack_of(cell, weights)
        number = given.x.itemsize * B * H
        scratch.clear()
        y, _, tape = forward(
            given.x, None, packed, tape="light", reverse=direction == "reverse", **options
        )
        assert sum(scratch) == y.nbytes + tape.nbytes - packed.nbytes
        assert tape.nbytes - packed.nbytes == number * D * states * root
        scratch.clear()
        backward(tape, weights, y, None, need=("weight_ih", "weight_hh"), **own_options(cell))
        slots = states + len(CELLS[cell].tape_gates)
        assert sum(scratch) == number * (slots * root + (2 + D) * states)


def test_a_stack_of_layers():
    """What one layer hands to the next is kept, dropped numbers and all, and counted."""
    T, B, H = 10_000, 2, 8
    module = rnnfast.LSTM(3, H, 3, dropout=0.5, seed=1)
    y, _, light = module.forward_train(random(T, B, 3), tape="light")
    _, _, full = module.forward_train(random(T, B, 3))
    assert sum(one.nbytes for one in full.layers) == 3 * 4 * B * (6 * H * T + 2 * H)
    assert full.nbytes - sum(one.nbytes for one in full.layers) == 2 * y.nbytes
    assert light.nbytes - sum(one.nbytes for one in light.layers) == 2 * y.nbytes
    assert sum(one.nbytes for one in light.layers) < 0.02 * full.nbytes


PEAK = """
    import json
    import numpy as np
    import rnnfast

    def peak():
        with open("/proc/self/status") as file:
            return 1024 * int(file.read().split("VmHWM:")[1].split()[0])

    rnnfast.set_num_threads(2)
    T, B, I, H = 20_000, 8, 16, 32
    module = rnnfast.LSTM(I, H, seed=0)
    x = np.full((T, B, I), 0.5, np.float32)
    dy = np.full((T, B, H), 0.5, np.float32)
    module.backward(module.forward_train(x[:2])[2], dy[:2])  # threads, buffers, code
    before = peak()
    y, _, tape = module.forward_train(x, tape={kind!r})
    module.backward(tape, dy)
    print(json.dumps([peak() - before, tape.nbytes, y.nbytes + x.nbytes]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_the_peak_of_the_process():
    """As the system counts it: y, dx and the tape, and a few megabytes beside them."""
    T, B, H, few = 20_000, 8, 32, 12e6
    peak, tape, results = in_child(PEAK.format(kind="full"))
    assert tape == 4 * B * (6 * H * T + 2 * H)  # 123 MB
    assert tape < peak < tape + results + few
    peak, tape, results = in_child(PEAK.format(kind="light"))
    assert tape < 1e6
    assert results < peak < results + few


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [None, True, 1, "", "Light", "none", b"light", ["light"]])
def test_other_words_are_refused(value):
    module, x = rnnfast.LSTM(3, 5), random(6, 4, 3)
    W, R = np.zeros((20, 3), "f4"), np.zeros((20, 5), "f4")
    needs = "^tape: got .*; needs 'full' or 'light'$"
    with pytest.raises((TypeError, ValueError), match=needs):
        module.forward_train(x, tape=value)
    for train in (True, False):
        with pytest.raises((TypeError, ValueError), match=needs):
            functional.lstm_forward(x, None, (W, R, None, None), tape=value, train=train)
    assert module.dropout_calls == 0


def test_no_tape_is_not_light():
    W = np.zeros((5, 5), "f4")
    with pytest.raises(ValueError, match=r"^tape: got 'light' with train=False; needs train=True"):
        functional.rnn_forward(random(6, 4, 5), None, (W, W, None, None), tape="light", train=False)


def spoilt_tapes():
    """What a light tape's owner may have done to it."""
    other = rnnfast.LSTM(3, 6)
    wrong_packs = {
        "none": None,
        "no pack": object(),
        "an empty pack": _kernels.Pack(),
        "a backward pack": packs_of("lstm", 3, 5)[1],
        "another cell's": packs_of("gru", 3, 5)[0],
        "another input size's": packs_of("lstm", 4, 5)[0],
        "another hidden size's": packs_of("lstm", 3, 6)[0],
        "another dtype's": packs_of("lstm", 3, 5, np.float64)[0],
        "two directions'": rnnfast.LSTM(3, 5, bidirectional=True)._pack(0, _kernels.FORWARD),
    }
    for label, packed in wrong_packs.items():
        yield f"pack: {label}", {"pack": packed}
    for steps in (0, -1, 1, 10**9, 10**30, True, 64.0, None, "64", np.int64(64)):
        yield f"steps: {steps!r}", {"steps": steps}
    yield "pack and steps of a full one", {"steps": 0, "pack": None}
    _, _, tape = other.forward_train(random(6, 4, 3), tape="light")
    yield "states of another size", {"h": tape.layers[0].h, "c": tape.layers[0].c}
    for label, change in {
        "one slice less": lambda a: a[1:].copy(),
        "a slice more": lambda a: np.concatenate([a, a[:1]]),
        "slices last": lambda a: np.ascontiguousarray(a.swapaxes(0, 1)),
        "none": lambda a: None,
        "not contiguous": lambda a: np.repeat(a, 2, axis=3)[..., ::2],
    }.items():
        yield f"h: {label}", {"h": change}
        yield f"c: {label}", {"c": change}
    yield "gates", {"gates": np.zeros((1, 300, 4, 4, 5), np.float32)}
    yield "lengths that are shorter", {"lengths": np.full(4, 3)}
    yield "lengths that are longer", {"lengths": np.full(4, 301)}


@pytest.mark.parametrize(("label", "change"), [pytest.param(*p, id=p[0]) for p in spoilt_tapes()])
def test_an_altered_tape_is_refused(label, change, small_slices):
    module = rnnfast.LSTM(3, 5, seed=1)
    y, _, tape = module.forward_train(random(300, 4, 3), tape="light")
    layer = tape.layers[0]
    assert (layer.steps, layer.h.shape) == (32, (10, 1, 4, 5))
    for field, value in change.items():
        if callable(value):
            value = value(getattr(layer, field))
        setattr(layer, field, value)
    with pytest.raises(ValueError, match=r"^tape: got"):
        module.backward(tape, y)
    assert not module.flat_grads.any()


# ---------------------------------------------------------------------------------------- Ctrl-C

# Slices of some milliseconds: less than the engine lets pass in a call before it asks for signals.
INTERRUPTED = """
    import json, os, signal, threading, time
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads(1)
    module = rnnfast.LSTM(512, 64, seed=1)
    x = np.broadcast_to(np.full(512, 0.5, np.float32), (20_000, 16, 512))
    dy = np.broadcast_to(np.full(64, 0.5, np.float32), (20_000, 16, 64))
    if {name!r} == "backward":
        tape = module.forward_train(x, tape="light")[2]
    module.flat_grads += 1
    before = module.flat.tobytes(), module.flat_grads.tobytes()
    clock = time.pthread_getcpuclockid(threading.main_thread().ident)
    sent = []

    def interrupt():
        time.sleep(0.3)
        sent.append(time.clock_gettime(clock))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        if {name!r} == "backward":
            module.backward(tape, dy, need_dx=False)
        else:
            module.forward_train(x, tape="light")
        took = None
    except KeyboardInterrupt:
        took = time.clock_gettime(clock) - sent[0]
    same = (module.flat.tobytes(), module.flat_grads.tobytes()) == before
    print(json.dumps([took, same]))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="needs a clock of one thread's time")
@pytest.mark.parametrize("name", ["forward_train", "backward"])
def test_ctrl_c_ends_a_call_and_changes_nothing(name):
    took, same = in_child(INTERRUPTED.format(name=name))
    assert took is not None, "the call ended before it was interrupted"
    assert same, "an interrupted call changed weights or gradients"
    # A quarter second of the thread's own time: others may be using the machine.
    assert took <= 0.25, f"{name} went on for {took:.3f} s"
