"""DropConnect on R: a plain module's results and gradients with the dropped weights.

Knows the public API and the reference's generator. What a plain module computes is judged in
test_kernels.
"""

import copy
import pickle
import signal
import time

import numpy as np
import pytest
from cases import make_module
from test_api import bits, random

import rnnfast
from rnnfast import reference
from rnnfast.cells import CELLS

T, B, I, H = 7, 5, 4, 6
SEED = 3


def masks_of(module, call, p):
    """For each name of an R, which of its numbers a call keeps: the reference's generator."""
    names = [name for name in module.params if name.startswith("weight_hh")]
    return {
        name: reference.dropout_mask(SEED, call, 2**63 + k, 1, *module.params[name].shape, p)[0]
        for k, name in enumerate(names)
    }


def twins(cell, L, p, **others):
    """A module that drops, and a plain one to put dropped weights in."""
    dropping = make_module(cell, I, H, L, drop_connect=p, seed=SEED, **others)
    return dropping, make_module(cell, I, H, L, seed=SEED, **others)


def dropped(module, masks, p):
    """Parameters with those of R that a mask keeps, divided by 1 - p, in their own dtype."""
    scale = module.dtype.type(1 / (1 - p)) if p < 1 else 0
    params = module.state_dict()
    return params | {name: params[name] * mask * scale for name, mask in masks.items()}


@pytest.mark.parametrize("kind", ["full", "light"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell, L, bidirectional, dtype, kind):
    p = 0.3
    module, plain = twins(
        cell, L, p, dtype=dtype, bidirectional=bidirectional, dropout=0.5 * (L > 1)
    )
    x, dy = random(T, B, I, dtype=dtype), random(T, B, H * (1 + bidirectional), dtype=dtype, seed=1)
    lengths = [7, 0, 3, 1, 7]
    seen = []
    for call in range(2):
        masks = masks_of(module, call, p)
        seen.append(masks)
        plain.load_state_dict(dropped(module, masks, p))
        want, state_n, tape = plain.forward_train(x, lengths=lengths, tape=kind)
        y, got_n, own = module.forward_train(x, lengths=lengths, tape=kind)
        assert bits([y, got_n]) == bits([want, state_n])
        for k, mask in enumerate(masks.values()):
            layer, direction = divmod(k, 1 + bidirectional)
            found = own.drop_connect_mask(layer, direction)
            assert found.dtype == bool and bits(found) == bits(mask)
            assert 0.3 < mask.mean() < 0.95
        for accumulate in (False, True):
            got = module.backward(own, dy, got_n, accumulate=accumulate)
            assert bits(got) == bits(plain.backward(tape, dy, state_n, accumulate=accumulate))
            times = module.dtype.type(1 + accumulate)
            scale = module.dtype.type(1 / (1 - p))
            for name, grad in plain.grads.items():
                once = grad / times
                want = np.where(masks[name], once * scale, 0) if name in masks else once
                assert bits(module.grads[name]) == bits(want * times), name
    assert bits(list(seen[0].values())) != bits(list(seen[1].values()))
    assert bits(module(x)) == bits(
        twins(cell, L, p, dtype=dtype, bidirectional=bidirectional)[1](x)
    )


def test_gradients_are_those_of_the_loss():
    """By differences in float64: the mask stays with seed and dropout_calls."""
    gru = rnnfast.GRU(I, 3, 2, drop_connect=0.4, dtype=np.float64, seed=SEED)
    x, dy = random(T, B, I, dtype="float64"), random(T, B, 3, dtype="float64", seed=1)

    def loss():
        gru.dropout_calls = 9
        y, _, tape = gru.forward_train(x)
        return float((y * dy).sum()), tape

    gru.backward(loss()[1], dy)
    for k in range(gru.flat.size):
        before = gru.flat[k]
        ends = []
        for step in (1e-6, -1e-6):
            gru.flat[k] = before + step
            ends.append(loss()[0])
        gru.flat[k] = before
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gru.flat_grads[k], rel=1e-6, abs=1e-8)


def test_masks_are_others_than_dropouts():
    """Of the layer, the direction, the call and what dropout between layers draws."""
    module = rnnfast.RNN(64, 64, 3, bidirectional=True, drop_connect=0.5, dropout=0.5, seed=SEED)
    masks = []
    for _ in range(2):
        tape = module.forward_train(np.zeros((1, 1, 64), np.float32))[2]
        masks += [tape.drop_connect_mask(layer, d) for layer in range(3) for d in range(2)]
    masks += [reference.dropout_mask(SEED, 0, layer, 1, 64, 64, 0.5)[0] for layer in range(2)]
    for i, one in enumerate(masks):
        assert abs(one.mean() - 0.5) < 5 * 0.5 / 64
        for other in masks[:i]:
            assert abs((one == other).mean() - 0.5) < 5 * 0.5 / 64


@pytest.mark.parametrize("L", [1, 2])
def test_threads_tapes_and_frozen_modules_have_the_same_bits(L, choose, monkeypatch):
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 0)
    module = rnnfast.LSTM(I, 40, L, drop_connect=0.3, learn_initial=True, seed=SEED)
    x, dy = random(40, B, I), random(40, B, 40)

    def run(kind):
        module.dropout_calls = 4
        y, state, tape = module.forward_train(x, tape=kind)
        got = module.backward(tape, dy, state, accumulate=False)
        return bits([y, *state, got[0], *got[1], module.flat_grads.copy()])

    choose(1)
    want = run("full")
    for threads, plan in ((1, "auto"), (3, "batch"), (2, "units"), (2, "wavefront")):
        choose(threads, plan)
        assert run("full") == run("light") == want
    plain = bits(module(x))
    module.freeze()
    assert run("full") == run("light") == want
    assert bits(module(x)) == plain


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything_dropped(p):
    module, plain = twins("lstm", 1, p)
    x = random(T, B, I)
    if p:
        plain.params["weight_hh_l0"] = np.zeros((4 * H, H), np.float32)
    y, _, tape = module.forward_train(x)
    want, _, plain_tape = plain.forward_train(x)
    assert bits(y) == bits(want)
    assert (tape.drop_connect_mask(0) == (p == 0)).all()
    module.backward(tape, y)
    plain.backward(plain_tape, y)
    assert module.grads["weight_hh_l0"].any() == (p == 0)
    assert bits(module.grads["weight_ih_l0"]) == bits(plain.grads["weight_ih_l0"])


def test_copies_files_and_words(tmp_path):
    module = rnnfast.GRU(I, H, 2, drop_connect=0.25, seed=SEED)
    assert repr(module) == f"GRU({I}, {H}, num_layers=2, drop_connect=0.25)"
    assert module.drop_connect == 0.25
    x = random(T, B, I)
    y, _, tape = module.forward_train(x)
    module.save(tmp_path / "saved")
    twin = rnnfast.load(tmp_path / "saved")
    assert bits(twin.forward_train(x)[0]) == bits(module.forward_train(x)[0]) != bits(y)
    module.backward(tape, y, accumulate=False)
    want = module.flat_grads.copy()
    for again in (copy.copy(tape), copy.deepcopy(tape), pickle.loads(pickle.dumps(tape))):
        module.backward(again, y, accumulate=False)
        assert bits(module.flat_grads) == bits(want)


def test_bad_arguments():
    for value, error in (
        (1.5, ValueError),
        (-0.1, ValueError),
        (np.nan, ValueError),
        ("0", TypeError),
    ):
        with pytest.raises(error, match=r"^drop_connect: got .*; needs a number in \[0, 1\]"):
            rnnfast.LSTM(I, H, drop_connect=value)
    tape = rnnfast.LSTM(I, H, drop_connect=0.5).forward_train(random(T, B, I))[2]
    for args, name in (((1,), "layer"), ((-1,), "layer"), ((0, 1), "direction"), ((0.0,), "layer")):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: got .*; needs an integer in"):
            tape.drop_connect_mask(*args)


def test_an_interrupted_call_leaves_gradients_as_they_were():
    module = rnnfast.LSTM(300, 300, drop_connect=0.5, learn_initial=True, seed=1)
    x, dy = random(40, 160, 300), random(40, 160, 300, seed=1)
    tape = module.forward_train(x)[2]
    module.flat_grads = before = random(module.flat_grads.size)

    class Stop(Exception):
        pass

    def stop(number, frame):
        raise Stop

    started = time.perf_counter()
    module.backward(tape, dy)
    whole = time.perf_counter() - started
    after = module.flat_grads.copy()
    handler = signal.signal(signal.SIGALRM, stop)
    interrupted = 0
    try:
        for share in np.linspace(0.05, 0.98, 12):
            module.flat_grads = before
            signal.setitimer(signal.ITIMER_REAL, max(1e-4, share * whole))
            try:
                module.backward(tape, dy)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                interrupted += 1
            assert bits(module.flat_grads) in (bits(before), bits(after))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupted


def test_beside_dropout_inside_the_recurrence():
    options = dict(recurrent_dropout=0.3, zoneout=0.2, bidirectional=True, merge="sum")
    module, plain = twins("gru", 2, 0.4, **options)
    x = random(T, B, I)
    masks = masks_of(module, 0, 0.4)
    plain.load_state_dict(dropped(module, masks, 0.4))
    y, _, tape = module.forward_train(x)
    want, _, plain_tape = plain.forward_train(x)
    assert bits(y) == bits(want)
    assert bits(module.backward(tape, y)) == bits(plain.backward(plain_tape, y))
