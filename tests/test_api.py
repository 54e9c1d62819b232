"""The Python API: parameters, freezing, copies, dropout, the functions, settings.

Knows the public API. Numbers are judged in test_kernels, bad input in test_bad_input, files in
test_storage, streams in test_stream, threads and signals in test_process.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from cases import make_module, options_of, own_options, pack_of

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


def test_names_of_pytorch_lead_to_ours():
    module = rnnfast.LSTM(I, H)
    with pytest.raises(AttributeError, match="'forward': call the object itself"):
        _ = module.forward
    with pytest.raises(AttributeError, match=r"that parameter is params\['bias_hh_l0'\]"):
        _ = module.bias_hh_l0
    with pytest.raises(AttributeError, match=r"has no attribute 'bias_hh_l1'$"):
        _ = module.bias_hh_l1


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
        "GRU(3, 5, batch_first=True, bidirectional=True, reset_after=False)",
        "LSTM(3, 5, num_layers=2, dropout=0.5)",
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


# ------------------------------------------------------------------------------ an LSTM's options


def test_variants_have_their_own_parameters():
    for options, gates, peepholes in (
        ({"peephole": True}, 4, 3), ({"coupled": True}, 3, 0),
        ({"peephole": True, "coupled": True}, 3, 2),
    ):  # fmt: skip
        lstm = rnnfast.LSTM(I, H, 2, bidirectional=True, **options)
        assert lstm.params["weight_ih_l1_reverse"].shape == (gates * H, 2 * H)
        names = [name for name in lstm.params if "peephole" in name]
        assert len(names) == 4 * bool(peepholes)
        for name in names:
            assert lstm.params[name].shape == (peepholes * H,)
            assert 0 < np.abs(lstm.params[name]).max() <= H**-0.5
        want = ", ".join(f"{name}=True" for name in options)
        assert repr(lstm) == f"LSTM({I}, {H}, num_layers=2, bidirectional=True, {want})"
        assert (lstm.peephole, lstm.coupled) == ("peephole" in options, "coupled" in options)


def test_weights_of_another_variant_are_refused():
    x, plain = random(T, B, I), tuple(rnnfast.LSTM(I, H).params.values())
    peephole = tuple(rnnfast.LSTM(I, H, peephole=True).params.values())
    with pytest.raises(ValueError, match=r"^weights: .*; needs \(W, R, b_ih, b_hh, P\) or"):
        functional.lstm_forward(x, None, plain, peephole=True)
    with pytest.raises(ValueError, match=r"^weights \(W_hr\): got shape .*; needs \[P, H\]"):
        functional.lstm_forward(x, None, peephole)
    with pytest.raises(TypeError, match=r"^weights \(P\): got None"):
        functional.lstm_forward(x, None, (*plain, None), peephole=True)
    with pytest.raises(ValueError, match=r"^weights \(R\): got shape .*needs \[3\*H, H\]"):
        functional.lstm_forward(x, None, plain, coupled=True)
    _, _, tape = functional.lstm_forward(x, None, peephole, peephole=True)
    with pytest.raises(ValueError, match=r"^tape: got one of cell 'lstm_peephole'; needs one of"):
        functional.lstm_backward(tape, plain, None, None)


def test_options_are_taken_as_they_were_checked(tmp_path):
    lstm = rnnfast.LSTM(I, H, peephole=np.True_, proj_size=np.int64(2), forget_bias=np.float32(1))
    assert repr(lstm) == f"LSTM({I}, {H}, proj_size=2, peephole=True, forget_bias=1.0)"
    lstm.save(tmp_path / "saved")
    assert repr(rnnfast.load(tmp_path / "saved")) == repr(lstm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (1e39, np.float64(1e39)):
            with pytest.raises(
                ValueError, match=r"^forget_bias: got 1e\+39; needs a finite number"
            ):
                rnnfast.LSTM(I, H, forget_bias=value)


def test_a_pickle_of_the_version_before_peepholes():
    lstm = rnnfast.LSTM(I, H, seed=1)
    state = lstm.__getstate__()
    for name in ("peephole", "coupled", "forget_bias"):
        del state["arguments"][name]
    again = rnnfast.LSTM.__new__(rnnfast.LSTM)
    again.__setstate__(state)
    assert repr(again) == repr(lstm) and bits(again.flat) == bits(lstm.flat)


def test_gradients_that_there_are_not_are_refused():
    for module, backward, name in (
        (rnnfast.GRU(I, H), functional.gru_backward, "weight_peephole"),
        (rnnfast.LSTM(I, H), functional.lstm_backward, "weight_hr"),
    ):
        weights = tuple(module.params.values())
        forward = getattr(functional, backward.__name__.replace("backward", "forward"))
        _, _, tape = forward(random(T, B, I), None, weights)
        everything = backward(tape, weights, None, None).weights
        same = backward(tape, weights, None, None, need=list(functional.NEEDS)).weights
        assert len(everything) == len(weights) and bits(same) == bits(everything)
        with pytest.raises(ValueError, match=f"^need: got '{name}'"):
            backward(tape, weights, None, None, need=name)


def test_forget_bias():
    without = rnnfast.LSTM(I, H, 2, bidirectional=True, seed=3)
    lstm = rnnfast.LSTM(I, H, 2, bidirectional=True, seed=3, forget_bias=1.5)
    forget = slice(H, 2 * H)
    for name, array in lstm.params.items():
        other = without.params[name].copy()
        if name.startswith("bias"):
            other[forget] = 1.5 if "ih" in name else 0
        assert bits(array) == bits(other), name
    assert lstm.forget_bias == 1.5 and "forget_bias=1.5" in repr(lstm)
    for options, needs in (({"coupled": True}, "a coupled"), ({"bias": False}, "where bias is")):
        with pytest.raises(ValueError, match=f"^forget_bias: got 1.0; needs None.*{needs}"):
            rnnfast.LSTM(I, H, forget_bias=1, **options)


# ------------------------------------------------------------------------------------- functional


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_functions_have_the_modules_bits(cell, packed):
    stem, options = options_of(cell)
    module = make_module(cell, I, H, seed=1)
    forward, backward, step = (
        getattr(functional, f"{stem}_{verb}") for verb in ("forward", "backward", "step")
    )
    weights = tuple(module.params.values())
    for_forward, for_backward = weights, weights
    if packed:
        for_forward = pack_of(cell, weights)
        for_backward = pack_of(cell, weights, "backward")
    x, dy = random(T, B, I), random(T, B, H, seed=2)
    y, state, tape = forward(x, None, for_forward, lengths=[6, 1, 0, 3], **options)
    want_y, want_state, want_tape = module.forward_train(x, lengths=[6, 1, 0, 3])
    assert bits([y, state]) == bits([want_y, want_state])
    grads = backward(tape, for_backward, dy, None, **own_options(cell))
    want = module.backward(want_tape, dy)
    assert bits([grads.x, grads.state]) == bits(want)
    assert bits(grads.weights) == bits(list(module.grads.values()))
    no_tape = forward(x, None, for_forward, train=False, **options)
    assert no_tape[2] is None
    assert bits(no_tape[0]) == bits(module(x)[0])

    state, ys = None, []
    for x_t in x:
        state = step(x_t, state, for_forward, **options)
        ys.append(state[0] if stem == "lstm" else state)
    assert bits(np.stack(ys)) == bits(module(x)[0])
    single = step(x[0, 0], None, for_forward, **options)
    first = single[0] if stem == "lstm" else single
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
            CELLS["lstm"].parameters(), grads.weights, everything.weights, strict=True
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


def test_the_configuration_is_shown(capsys):
    assert rnnfast.show_config() is None
    shown = capsys.readouterr().out
    found = rnnfast.show_config("dicts")
    assert found["isa"] in found["isas"]
    for key, value in found.items():
        assert key in shown
        assert str(value if isinstance(value, (str, int)) else value[0]) in shown
