"""Activations and clips as options: their kernels number by number, and what the API makes of them.

Knows the reference, the compiled layer and the public API. Gradients through time are judged in
test_kernels, as those of every cell; ONNX's operators in test_onnx_truth.
"""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from cases import (
    BOUNDED,
    DTYPES,
    FUNCTIONS,
    UNBOUNDED,
    Case,
    Shape,
    make_inputs,
    options_of,
    own_options,
    pack_of,
    run_kernel,
)
from test_api import bits, random
from tolerances import assert_close, assert_same_bits

import rnnfast
from rnnfast import _kernels, functional, reference, storage
from rnnfast.cells import ACTIVATIONS, CELLS, PLAIN, Functions

T, B, I, H = 5, 3, 4, 6
GENERAL = [cell for cell in CELLS if CELLS[cell].general]


# ------------------------------------------------------------------------------ number by number


def elementwise(activation, clip, z):
    """An activation and its derivative by the kernels: an RNN of one step whose x W is z."""
    dtype, n = z.dtype, z.size
    weights = np.ones((1, 1), dtype), np.zeros((1, 1), dtype), None, None
    options = dict(activations=(activation,), clip=clip)
    x = z.reshape(1, n, 1)
    y, _, tape = functional.rnn_forward(x, None, weights, **options)
    own = {"nonlinearity": "relu"} if tape.cell == "rnn_relu" else {}
    grads = functional.rnn_backward(tape, weights, np.ones_like(y), None, need="x", **own)
    return y.ravel(), grads.x.ravel()


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", (*ACTIVATIONS, *BOUNDED, *UNBOUNDED), ids=str)
def test_values_and_slopes(activation, dtype, isa, use_isa):
    """Within 4 units in the last place of 1, or of the value: at kinks and limits, too."""
    use_isa(isa)
    rng = np.random.default_rng(0)
    z = np.concatenate([
        rng.uniform(-100, 100, 2000), rng.normal(0, 1, 2000), rng.normal(0, 1e-3, 200),
        [0.0, -0.0, 1.0, -1.0, 0.25, 2.5, -2.5, 1.25, -1.25, 1e30, -1e30, 1e-20, -1e-20],
    ]).astype(dtype)  # fmt: skip
    near = z[np.abs(z) < 1e4]
    for clip, some in ((None, z), (1.25, z), (20.0, near)):
        value, slope = elementwise(activation, clip, some)
        wide = some.astype(np.float64)
        with np.errstate(over="ignore"):
            want, want_slope = (
                f(activation, wide, clip) for f in (reference.activate, reference.slope)
            )
        eps = 4 * np.finfo(dtype).eps
        assert (np.abs(value - want) <= eps * np.maximum(1, np.abs(want))).all(), (activation, clip)
        assert (np.abs(slope - want_slope) <= eps * np.maximum(1, np.abs(want_slope))).all()
        if clip:
            assert not slope[np.abs(some) > clip].any()
            limit = some.astype(np.float64) == clip  # what just touches it is not cut
            np.testing.assert_allclose(slope[limit], want_slope[limit], rtol=1e-5)


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_and_nan(activation, dtype, isa, use_isa):
    """A NaN stays one, also where it is clipped; infinities have the limits of the reference."""
    use_isa(isa)
    z = np.array([np.inf, -np.inf, np.nan], dtype)
    for clip in (None, 2.0):
        value, _ = elementwise(activation, clip, z)
        want = reference.activate(activation, z.astype(np.float64), clip)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        assert np.isnan(value[2])


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GENERAL)
def test_a_general_cell_with_the_plain_functions_has_the_plain_bits(
    cell, dtype, isa, use_isa, monkeypatch
):
    use_isa(isa)
    row = CELLS[cell]
    plain = "rnn_tanh" if row.kind == "RNN" else cell.removesuffix("_general")
    case = Case(plain, Shape(7, 5, 9, 37), "bidirectional", dtype, "with zero")
    want, _ = run_kernel(case)
    monkeypatch.setattr(Case, "functions", Functions(PLAIN.get(row.kind, ("tanh",))))
    got, _ = run_kernel(replace(case, cell=cell), inputs=make_inputs(case))
    for name in want:
        if name != "tape_gates":
            assert_same_bits(name, got[name], want[name], context=f"{case} {isa}")


# -------------------------------------------------------------------------------- the public API


def module_of(cell, **more):
    kind, options = options_of(cell)
    return getattr(rnnfast, kind.upper())(I, H, 2, seed=1, **options, **more)


@pytest.mark.parametrize("cell", GENERAL)
def test_functions_have_the_modules_bits(cell):
    kind, options = options_of(cell)
    module = getattr(rnnfast, kind.upper())(I, H, seed=1, **options)
    forward, backward, step = (
        getattr(functional, f"{kind}_{verb}") for verb in ("forward", "backward", "step")
    )
    weights, x = tuple(module.params.values()), random(T, B, I)
    want_y, want_state, want_tape = module.forward_train(x)
    assert want_tape.layers[0].cell == cell
    assert want_tape.layers[0].functions == FUNCTIONS[cell]
    y, state, tape = forward(x, None, weights, **options)
    assert bits([y, state]) == bits([want_y, want_state])
    grads = backward(tape, weights, y, None, **own_options(cell))
    assert bits([grads.x, grads.state]) == bits(module.backward(want_tape, y))
    assert bits(grads.weights) == bits(list(module.grads.values()))
    state, ys = None, []
    for x_t in x:
        state = step(x_t, state, weights, **options)
        ys.append(state[0] if kind == "lstm" else state)
    assert bits(np.stack(ys)) == bits(y)
    stream = module.stream(B)
    assert bits(stream.process(x)) == bits(y)


@pytest.mark.parametrize("cell", GENERAL)
def test_copies_files_and_pickles(cell, tmp_path):
    module, x = module_of(cell), random(T, B, I)
    module.save(tmp_path / "saved")
    again = [rnnfast.load(tmp_path / "saved"), copy.deepcopy(module)]
    again.append(pickle.loads(pickle.dumps(module)))
    for other in again:
        assert repr(other) == repr(module)
        assert type(other.activations) is tuple or CELLS[cell].kind == "RNN"
        assert (other.activations, other.clip) == (module.activations, module.clip)
        assert bits(other(x)) == bits(module(x))
        tape = other.forward_train(x)[2]
        assert tape.layers[0].functions == FUNCTIONS[cell]


def test_what_is_shown_and_chosen():
    lstm = rnnfast.LSTM(I, H, activations=["hardsigmoid", ["elu", 2], "tanh"], clip=np.float32(3))
    assert lstm.activations == (("hardsigmoid", 0.2, 0.5), ("elu", 2.0), "tanh")
    assert (lstm.clip, lstm.cell_clip) == (3.0, None) and type(lstm.clip) is float
    shown = "activations=(('hardsigmoid', 0.2, 0.5), ('elu', 2.0), 'tanh'), clip=3.0"
    assert repr(lstm) == f"LSTM({I}, {H}, {shown})"
    gru = rnnfast.GRU(I, H, activations=("sigmoid", ("scaledtanh", 2)), reset_after=False)
    assert gru.activations == ("sigmoid", ("scaledtanh", 2.0, 1.0)) and not gru.reset_after
    rnn = rnnfast.RNN(I, H, nonlinearity="relu", clip=6)
    assert repr(rnn) == f"RNN({I}, {H}, nonlinearity='relu', clip=6.0)"
    assert (rnn.nonlinearity, rnn.activations) == ("relu", None)
    # What the plain cells do, they do, whatever words were used.
    x = random(T, B, I)
    for module, cell in (
        (rnnfast.LSTM(I, H, activations=("sigmoid", "tanh", "tanh")), "lstm"),
        (rnnfast.GRU(I, H, activations=["sigmoid", "tanh"]), "gru"),
        (rnnfast.RNN(I, H, activations=("tanh",)), "rnn_tanh"),
        (rnnfast.RNN(I, H, activations=("relu",)), "rnn_relu"),
        (rnnfast.RNN(I, H, 1, "relu", activations=("relu",)), "rnn_relu"),
        (rnnfast.RNN(I, H, clip=1), "rnn_general"),
        (rnnfast.LSTM(I, H, cell_clip=1), "lstm_general"),
    ):
        assert module.forward_train(x)[2].layers[0].cell == cell
        assert repr(copy.deepcopy(module)) == repr(module)


@pytest.mark.parametrize(("call", "match"), [
    (lambda: rnnfast.LSTM(2, 3, activations="tanh"), r"activations: got 'tanh'; needs a tuple"),
    (lambda: rnnfast.LSTM(2, 3, activations=None), "activations: got None; needs a tuple"),
    (lambda: rnnfast.LSTM(2, 3, activations=("tanh",) * 2), "activations: got tuple of 2; needs"),
    (lambda: rnnfast.GRU(2, 3, activations=("tanh",) * 3), r"activations: .* 2 activations \(f, g"),
    (lambda: rnnfast.GRU(2, 3, activations=("tanh", "Tanh")), r"activations \(g\): got 'Tanh'; ne"),
    (lambda: rnnfast.GRU(2, 3, activations=("tanh", 3)), r"activations \(g\): got 3; needs one of"),
    (lambda: rnnfast.GRU(2, 3, activations=((), "tanh")), r"activations \(f\): got tuple of 0; n"),
    (lambda: rnnfast.GRU(2, 3, activations=(("tanh", 1), "tanh")), r"\(f\): .*needs no parameters"),
    (lambda: rnnfast.GRU(2, 3, activations=(("elu", 1, 2), "tanh")), r"\(f\): .*needs alpha alone"),
    (lambda: rnnfast.GRU(2, 3, activations=(("elu", "1"), "tanh")), r"\(f\): got '1'; needs a fin"),
    (lambda: rnnfast.GRU(2, 3, activations=(("elu", 1e39), "tanh")), r"\(f\): got 1e\+39; needs a"),
    (lambda: rnnfast.GRU(2, 3, clip=0), "clip: got 0; needs a finite number above 0"),
    (lambda: rnnfast.GRU(2, 3, clip=1e-39), "clip: got 1e-39; needs a finite number above 0"),
    (lambda: rnnfast.LSTM(2, 3, cell_clip=np.inf), "cell_clip: got inf; needs a finite number"),
    (lambda: rnnfast.LSTM(2, 3, cell_clip=True), "cell_clip: got True; needs a finite number"),
    (
        lambda: rnnfast.RNN(2, 3, nonlinearity="relu", activations=("tanh",)),
        r"nonlinearity: got 'relu' beside activations=\('tanh',\); needs to be left out",
    ),
    (lambda: rnnfast.RNN(2, 3, activations=()), r"activations: .* a tuple of 1 activation \(f\)"),
])  # fmt: skip
def test_what_is_refused(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()


def test_packs_and_tapes_of_other_functions_are_refused():
    weights = tuple(rnnfast.LSTM(I, H, seed=1).params.values())
    x, one, other = random(T, B, I), dict(clip=1.0), dict(clip=2.0)
    y, _, tape = functional.lstm_forward(x, None, weights, **one)
    packed = functional.pack("lstm", weights, **one)
    assert bits(functional.lstm_forward(x, None, packed, **one)[0]) == bits(y)
    for options in (other, {}, dict(clip=1.0, cell_clip=1.0)):
        with pytest.raises(ValueError, match=r"^weights: got a pack for"):
            functional.lstm_forward(x, None, packed, **options)
        back = functional.pack("lstm", weights, "backward", **options)
        with pytest.raises(ValueError, match=r"^weights: got a pack for"):
            functional.lstm_backward(tape, back, y, None)
    for other_tape in ("x", (), Functions(("tanh",) * 2), Functions(("tanh", "x", "tanh"))):
        altered = copy.copy(tape)
        altered.functions = other_tape
        with pytest.raises(ValueError, match=r"^tape: got"):
            functional.lstm_backward(altered, weights, y, None)
    with pytest.raises(ValueError, match=r"^tape: got one of cell 'lstm_general'; needs one of"):
        grus = tuple(rnnfast.GRU(I, H, seed=1).params.values())
        functional.gru_backward(tape, grus, y, None)
    module = rnnfast.LSTM(I, H, seed=1, **one)
    kept = module.forward_train(x)[2]
    kept.layers[0].functions = Functions(PLAIN["LSTM"], 2.0)
    with pytest.raises(ValueError, match=r"^tape: got one of Functions"):
        module.backward(kept, y)
    light = functional.lstm_forward(x, None, weights, tape="light", **one)[2]
    light.pack = functional.pack("lstm", weights, **other)
    with pytest.raises(ValueError, match=r"^tape: got an altered one"):
        functional.lstm_backward(light, weights, y, None)
    with pytest.raises(ValueError, match=r"^cell: got 'lstm_general' without what sets it apart"):
        functional.pack("lstm_general", weights)
    with pytest.raises(ValueError, match=r"^cell_clip: got 1; needs None: 'gru' has no c"):
        functional.pack("gru", weights, cell_clip=1)
    general = pack_of("lstm_general", weights)
    assert general.functions == FUNCTIONS["lstm_general"]


def test_files_and_pickles_of_the_version_before(tmp_path):
    for module in (
        rnnfast.LSTM(2, 3, seed=1),
        rnnfast.GRU(2, 3, seed=1),
        rnnfast.RNN(2, 3, seed=1),
    ):
        module.save(tmp_path / "new")
        header, arrays = storage.read(tmp_path / "new")
        state = module.__getstate__()
        for name in ("activations", "clip", "cell_clip"):
            header["arguments"].pop(name, None)
            state["arguments"].pop(name, None)
        storage.write(tmp_path / "old", header, arrays)
        assert repr(rnnfast.load(tmp_path / "old")) == repr(module)
        again = type(module).__new__(type(module))
        again.__setstate__(state)
        assert repr(again) == repr(module) and bits(again.flat) == bits(module.flat)


def test_a_file_with_other_activations_is_damaged(tmp_path):
    module = rnnfast.GRU(2, 3, activations=("sigmoid", ("elu", 0.5)), seed=1)
    module.save(tmp_path / "new")
    header, arrays = storage.read(tmp_path / "new")
    for wrong in (["sigmoid"], "sigmoid", ["sigmoid", ["elu", "x"]], {"f": "tanh"}, None):
        header["arguments"]["activations"] = wrong
        storage.write(tmp_path / "wrong", header, arrays)
        with pytest.raises(storage.DamagedFileError, match="activations"):
            rnnfast.load(tmp_path / "wrong")


def test_a_clip_that_nothing_reaches_changes_no_bit():
    x = random(T, B, I)
    for make in (rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN):
        plain, clipped = make(I, H, seed=1), make(I, H, seed=1, clip=1e6)
        assert bits(plain(x)) == bits(clipped(x))


def test_cell_clip_is_tensorflows():
    """c is held within the limit, h is made of that c, and a clipped c passes no gradient."""
    weights = np.zeros((4, 1)), np.zeros((4, 1)), np.array([9.0, 9, 9, 9]), None
    options = dict(cell_clip=0.75)
    state = np.zeros((1, 1, 1)), np.full((1, 1, 1), 3.0)
    _, (h, c), tape = functional.lstm_forward(np.zeros((1, 1, 1)), state, weights, **options)
    assert c.item() == 0.75
    assert_close("h", h, np.tanh([[[0.75]]]) / (1 + np.exp(-9.0)), np.float64)
    grads = functional.lstm_backward(tape, weights, None, (np.zeros_like(h), np.ones_like(c)))
    assert grads.state[1].item() == 0 and not grads.weights[2].any()
