"""The reference against calculus: every gradient of every cell by the complex step.

Knows the reference alone. A loss L = sum(y dy) + sum(state_n dstate) is evaluated at v + ih for
every element v of every input: Im L / h is the derivative, without any cancellation, to rounding
(Squire and Trapp, "Using complex variables to estimate derivatives of real functions", 1998).
"""

import math

import numpy as np
import pytest
from cases import (
    BOUNDED,
    FUNCTIONS,
    TURNS,
    UNBOUNDED,
    draw_functions,
    make_weights,
    past_lengths,
    poison,
)
from tolerances import COMPLEX_STEP, relative_error

from rnnfast import reference
from rnnfast.cells import ACTIVATIONS, CELLS, PLAIN
from rnnfast.merges import MERGES

T, B, I, H = 4, 3, 2, 3
STEP = 1e-30
RUNS = {"all valid": None, "uneven": [2, 4, 1], "with zero": [0, 3, 4], "all zero": [0, 0, 0]}


def with_functions(call):
    """A function of the reference that is given a general cell's functions, if no others."""

    def called(cell, *args, **how):
        return call(cell, *args, **{"functions": FUNCTIONS[cell], **how})

    return called


forward, backward, stack_forward, stack_backward = map(
    with_functions,
    (reference.forward, reference.backward, reference.stack_forward, reference.stack_backward),
)


def make(cell, *, bias=True, lengths=None, seed=0):
    """Random x, state, weights, dy, dstate in float64, NaN past the lengths."""
    rng = np.random.default_rng(seed)
    names = CELLS[cell].states
    x, dy = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, H))
    state = tuple(rng.standard_normal((B, H)) for _ in names)
    dstate = tuple(rng.standard_normal((B, H)) for _ in names)
    weights = make_weights(cell, I, H, rng, bias=bias)
    return poison(x, lengths), state, weights, poison(dy, lengths), dstate


def loss(cell, x, state, weights, dy, dstate, lengths=None, **how):
    """The loss whose gradients are asked for."""
    y, state_n, _ = forward(cell, x, state, weights, lengths=lengths, **how)
    valid = ~past_lengths(lengths, *x.shape[:2])
    total = 0.0 if dy is None else (y * np.where(valid[..., None], dy, 0)).sum()
    return total + sum((s * d).sum() for s, d in zip(state_n, dstate or (), strict=False))


def complex_step(f, arrays):
    """Derivatives of f(*arrays) by every element of every array; None and NaNs have none."""
    grads = []
    for i, array in enumerate(arrays):
        if array is None:
            grads.append(None)
            continue
        grad = np.zeros(array.shape)
        for index in np.argwhere(~np.isnan(array)):
            moved = array.astype(complex)
            moved[tuple(index)] += 1j * STEP
            grad[tuple(index)] = f(*arrays[:i], moved, *arrays[i + 1 :]).imag / STEP
        grads.append(grad)
    return grads


def assert_near(name, got, want, limit=COMPLEX_STEP):
    """Fails unless got is want to `limit`, relative."""
    error = relative_error(got, want)
    assert error <= limit, f"{name}: relative error {error:.3g}\ngot {got}\nwant {want}"


def check_gradients(cell, *, bias=True, lengths=None, loss_by="both", seed=0, **how):
    """All gradients of one run against the complex step."""
    x, state, weights, dy, dstate = make(cell, bias=bias, lengths=lengths, seed=seed)
    if loss_by == "y":
        dstate = None
    if loss_by == "state":
        dy = None
    how["lengths"] = lengths
    _, _, tape = forward(cell, x, state, weights, **how)
    got = backward(cell, x, tape, weights, dy, dstate, **how)
    n = len(state)

    def f(x, *rest):
        return loss(cell, x, rest[:n], rest[n:], dy, dstate, **how)

    want_x, *want = complex_step(f, [x, *state, *weights])
    assert_near("dx", got["x"], want_x)
    for name, have, need in zip(CELLS[cell].states, got["state"], want[:n], strict=True):
        assert_near(f"d{name}_0", have, need)
    for name, need in zip(CELLS[cell].parameters(), want[n:], strict=True):
        assert (got[name] is None) == (need is None), name
        if need is not None:
            assert_near(name, got[name], need)


@pytest.mark.parametrize("loss_by", ["both", "y", "state"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell, lengths, reverse, loss_by):
    check_gradients(cell, lengths=lengths, reverse=reverse, loss_by=loss_by)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_without_bias(cell):
    check_gradients(cell, bias=False)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if CELLS[cell].general])
def test_gradients_of_any_functions(cell):
    """Each activation in each place, with clips and without."""
    seen = set()
    for turn in range(TURNS):
        functions = draw_functions(cell, turn)
        check_gradients(cell, functions=functions, seed=turn)
        seen |= set(enumerate(functions.activations))
    assert len(seen) == len(functions.activations) * len(BOUNDED + UNBOUNDED)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_by_central_differences(cell):
    """A second, independent way, so that a function that is not analytic is not its own judge."""
    x, state, weights, dy, dstate = make(cell, seed=1)
    _, _, tape = forward(cell, x, state, weights)
    got = backward(cell, x, tape, weights, dy, dstate)
    arrays = [x, *state, *weights]
    grads = [got["x"], *got["state"], *(got[name] for name in CELLS[cell].parameters())]
    n = len(state)
    for i, (array, grad) in enumerate(zip(arrays, grads, strict=True)):
        want = np.zeros(array.shape)
        step = 1e-6 * np.abs(array).max()
        for index in np.ndindex(array.shape):
            both = []
            for h in (step, -step):
                moved = array.copy()
                moved[index] += h
                x_, *rest = *arrays[:i], moved, *arrays[i + 1 :]
                both.append(loss(cell, x_, rest[:n], rest[n:], dy, dstate))
            want[index] = (both[0] - both[1]) / (2 * step)
        # Truncation is 1e-12 of the array's scale, cancellation eps |loss| / 1e-6 = 1e-9.
        assert_near(f"array {i}", grad, want, 1e-7)


def test_relu_is_off_its_kink():
    """The runs above say something about relu: both of its sides occur, and no z is close to 0."""
    x, state, weights, _, _ = make("rnn_relu")
    y, _, tape = forward("rnn_relu", x, state, weights)
    W, R, b_ih, b_hh = weights
    z = x @ W.T + b_ih + tape["h"][:-1] @ R.T + b_hh
    assert (z > 0).any() and (z < 0).any() and np.abs(z).min() > 1e-3
    np.testing.assert_array_equal(y, np.maximum(z, 0))


# ------------------------------------------------------------- what the formulas say, by hand


def scalar_lstm(x, h, c, W, R, b_ih, b_hh):
    """One step of one row and one unit from the textbook, on numbers; gates i f g o."""
    s = [W[k, 0] * x + R[k, 0] * h + b_ih[k] + b_hh[k] for k in range(4)]
    i, f, o = (1 / (1 + np.exp(-s[k])) for k in (0, 1, 3))
    c = f * c + i * np.tanh(s[2])
    return o * np.tanh(c), c


def scalar_peephole(x, h, c, W, R, b_ih, b_hh, P):
    """Likewise; what i and f see of c is the old one, what o sees is the new one."""
    s = [W[k, 0] * x + R[k, 0] * h + b_ih[k] + b_hh[k] for k in range(4)]
    new = c / (1 + np.exp(-s[1] - P[1] * c)) + np.tanh(s[2]) / (1 + np.exp(-s[0] - P[0] * c))
    return np.tanh(new) / (1 + np.exp(-s[3] - P[2] * new)), new


def scalar_coupled(x, h, c, W, R, b_ih, b_hh, P):
    """Likewise; gates i g o."""
    s = [W[k, 0] * x + R[k, 0] * h + b_ih[k] + b_hh[k] for k in range(3)]
    i = 1 / (1 + np.exp(-s[0] - P[0] * c))
    new = c + i * (np.tanh(s[1]) - c)
    return np.tanh(new) / (1 + np.exp(-s[2] - P[1] * new)), new


def scalar_gru(x, h, W, R, b_ih, b_hh, reset_after):
    """Likewise; gates r z n."""
    r, z = (1 / (1 + np.exp(-(W[k, 0] * x + R[k, 0] * h + b_ih[k] + b_hh[k]))) for k in (0, 1))
    if reset_after:
        n = np.tanh(W[2, 0] * x + b_ih[2] + r * (R[2, 0] * h + b_hh[2]))
    else:
        n = np.tanh(W[2, 0] * x + b_ih[2] + R[2, 0] * (r * h) + b_hh[2])
    return ((1 - z) * n + z * h,)


def scalar_norm(*v):
    """The numbers of one row, normalised."""
    mean = sum(v) / len(v)
    var = sum((a - mean) ** 2 for a in v) / len(v)
    return [(a - mean) / (var + 1e-5) ** 0.5 for a in v]


def scalar_norms(x, h, W, R, b_ih, b_hh, g_ih, g_hh):
    """What comes from x and from h, each normalised over the gates of the one unit."""
    of_x = scalar_norm(*(w * x for w in W[:, 0]))
    of_h = scalar_norm(*(r * h for r in R[:, 0]))
    z_x = [g * v + b for g, v, b in zip(g_ih, of_x, b_ih, strict=True)]
    z_h = [g * v + b for g, v, b in zip(g_hh, of_h, b_hh, strict=True)]
    return z_x, z_h


def scalar_lstm_norm(x, h, c, *weights, cell):
    """An LSTM of these; a c of one unit is normalised to 0."""
    *gates, _, b_c = weights
    z_i, z_f, z_g, z_o = map(sum, zip(*scalar_norms(x, h, *gates), strict=True))
    c = c / (1 + np.exp(-z_f)) + np.tanh(z_g) / (1 + np.exp(-z_i))
    return np.tanh(b_c[0]) / (1 + np.exp(-z_o)), b_c[0] if cell else c


def scalar_gru_norm(x, h, *weights):
    """A GRU of these, r after the normalisation."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = scalar_norms(x, h, *weights)
    r, z = 1 / (1 + np.exp(-x_r - h_r)), 1 / (1 + np.exp(-x_z - h_z))
    return ((1 - z) * np.tanh(x_n + r * h_n) + z * h,)


def scalar_rnn(x, h, W, R, b_ih, b_hh, f):
    """Likewise; one gate."""
    return (f(W[0, 0] * x + b_ih[0] + R[0, 0] * h + b_hh[0]),)


def scalar_activation(activation, z, clip):
    """ONNX's words for it, on a number."""
    name, a, b = (activation, 0, 0) if isinstance(activation, str) else (*activation, 0)[:3]
    z = z if clip is None else max(-clip, min(clip, z))
    return {
        "sigmoid": lambda: 1 / (1 + math.exp(-z)),
        "tanh": lambda: math.tanh(z),
        "relu": lambda: max(0.0, z),
        "affine": lambda: a * z + b,
        "leakyrelu": lambda: z if z >= 0 else a * z,
        "thresholdedrelu": lambda: z if z >= a else 0.0,
        "scaledtanh": lambda: a * math.tanh(b * z),
        "hardsigmoid": lambda: min(max(a * z + b, 0.0), 1.0),
        "elu": lambda: z if z >= 0 else a * (math.exp(z) - 1),
        "softsign": lambda: z / (1 + abs(z)),
        "softplus": lambda: math.log(1 + math.exp(z)),
    }[name]()


def scalar_general(cell, x, s, w, functions):
    """One step of one row and one unit of any general cell."""
    W, R, b_ih, b_hh, *P = w
    activations, clip, cell_clip = functions

    def act(i, z, clip=clip):
        return float(scalar_activation(activations[i], float(z), clip))

    def z(k, h=s[0]):
        return W[k, 0] * x + R[k, 0] * h + b_ih[k] + b_hh[k]

    if cell == "rnn_general":
        return (act(0, z(0)),)
    if cell == "gru_general":
        r, u = act(0, z(0)), act(0, z(1))
        n = act(1, W[2, 0] * x + b_ih[2] + r * (R[2, 0] * s[0] + b_hh[2]))
        return ((1 - u) * n + u * s[0],)
    if cell == "gru_reset_before_general":
        r, u = act(0, z(0)), act(0, z(1))
        n = act(1, z(2, r * s[0]))
        return ((1 - u) * n + u * s[0],)
    p = P[0] if P else [0.0, 0.0, 0.0]
    c, coupled = s[1], "coupled" in cell
    i = act(0, z(0) + p[0] * c)
    f = 1 - i if coupled else act(0, z(1) + p[1] * c)
    c = f * c + i * act(1, z(1 if coupled else 2))
    c = c if cell_clip is None else max(-cell_clip, min(cell_clip, c))
    o = act(0, z(2 if coupled else 3) + p[1 if coupled else 2] * c)
    return o * act(2, c, None), c


SCALAR = {
    "rnn_tanh": lambda x, s, w: scalar_rnn(x, *s, *w, np.tanh),
    "rnn_relu": lambda x, s, w: scalar_rnn(x, *s, *w, lambda z: max(z, 0.0)),
    "lstm": lambda x, s, w: scalar_lstm(x, *s, *w),
    "lstm_peephole": lambda x, s, w: scalar_peephole(x, *s, *w),
    "lstm_coupled": lambda x, s, w: scalar_coupled(x, *s, *w, [0.0, 0.0]),
    "lstm_coupled_peephole": lambda x, s, w: scalar_coupled(x, *s, *w),
    "gru": lambda x, s, w: scalar_gru(x, *s, *w, True),
    "gru_reset_before": lambda x, s, w: scalar_gru(x, *s, *w, False),
    # One number is normalised to 0.
    "rnn_tanh_norm": lambda x, s, w: (np.tanh(w[2][0] + w[3][0]),),
    "rnn_relu_norm": lambda x, s, w: (max(w[2][0] + w[3][0], 0.0),),
    "lstm_norm": lambda x, s, w: scalar_lstm_norm(x, *s, *w, cell=False),
    "lstm_norm_cell": lambda x, s, w: scalar_lstm_norm(x, *s, *w, cell=True),
    "gru_norm": lambda x, s, w: scalar_gru_norm(x, *s, *w),
}


@pytest.mark.parametrize("cell", CELLS)
def test_one_unit_by_hand(cell):
    """Gate order, signs and which bias stands where, against formulas written out on numbers."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((5, 1, 1))
    weights = make_weights(cell, 1, 1, rng, kind="hard")
    state = tuple(rng.standard_normal((1, 1)) for _ in CELLS[cell].states)
    for k in range(40 if CELLS[cell].general else 1):
        functions = draw_functions(cell, k)
        y, state_n, _ = forward(cell, x, state, weights, functions=functions)
        now = tuple(float(s[0, 0]) for s in state)
        for t in range(5):
            if functions:
                now = scalar_general(cell, x[t, 0, 0], now, weights, functions)
            else:
                now = SCALAR[cell](x[t, 0, 0], now, weights)
            assert y[t, 0, 0] == pytest.approx(now[0], rel=1e-13, abs=1e-15)
        assert [float(s[0, 0]) for s in state_n] == pytest.approx(list(now), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_the_slope_of_an_activation(name):
    """By the complex step, on both sides of every kink, and what is clipped has none."""
    rng = np.random.default_rng(2)
    z = np.concatenate([rng.uniform(-40, 40, 400), rng.normal(0, 2, 400), [-1e3, 1e3]])
    for activation in [a for a in (name, *BOUNDED, *UNBOUNDED) if name in (a, a[0])]:
        for clip in (None, 1.25):
            moved = reference.activate(activation, z + 1j * STEP, clip)
            value = reference.activate(activation, z, clip)
            np.testing.assert_allclose(moved.real, value, rtol=1e-12, atol=1e-15)
            for one, have in zip(z[:800], value[:800], strict=True):
                if abs(one) < 30:
                    want = scalar_activation(_with_parameters(activation), one, clip)
                    assert have == pytest.approx(want, rel=1e-12, abs=1e-14), (activation, one)
            slope = reference.slope(activation, z, clip)
            np.testing.assert_allclose(slope, moved.imag / STEP, rtol=1e-12, atol=1e-15)
            if clip:
                assert not slope[np.abs(z) > clip].any()


def _with_parameters(activation):
    usual = ACTIVATIONS[activation] if isinstance(activation, str) else ()
    return (activation, *usual) if usual else activation


def test_activations_at_the_infinities_and_at_a_nan():
    z = np.array([-np.inf, np.inf, np.nan])
    with np.errstate(over="raise", divide="raise"):
        for name in reference.ACTIVATIONS:
            value, slope = reference.activate(name, z, None), reference.slope(name, z, None)
            assert np.isnan(value[2]) and not np.isnan(value[:2]).any(), name
            assert not np.isnan(slope[:2]).any(), name
            assert not np.isnan(reference.activate(name, z, 2.0)[:2]).any(), name
            assert not reference.slope(name, z, 2.0)[:2].any(), name


def test_general_cells_with_the_plain_functions_are_the_plain_cells():
    for cell in (cell for cell in CELLS if CELLS[cell].general):
        kind = CELLS[cell].kind
        functions = reference.Functions(PLAIN.get(kind, ("tanh",)))
        plain = "rnn_tanh" if kind == "RNN" else cell.removesuffix("_general")
        x, state, weights, dy, dstate = make(cell, lengths=RUNS["uneven"])
        results = []
        for name, own in ((plain, None), (cell, functions)):
            how = dict(lengths=RUNS["uneven"], functions=own)
            y, last, tape = forward(name, x, state, weights, **how)
            grads = backward(name, x, tape, weights, dy, dstate, **how)
            results.append([y, *last, *grads.pop("state"), *grads.values()])
        for got, want in zip(*results, strict=True):
            assert_near(cell, got, want, 1e-14)


def test_functions_belong_to_general_cells():
    x, state, weights, _, _ = make("lstm")
    with pytest.raises(ValueError, match="no other takes"):
        reference.forward("lstm", x, state, weights, functions=FUNCTIONS["lstm_general"])
    with pytest.raises(ValueError, match="what a general cell needs"):
        reference.forward("lstm_general", x, state, weights)


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm"])
def test_two_products_are_one(cell):
    """W x + R h is one product of [W R] with [x h]: the same layer with the states fed as input."""
    x, state, (W, R, b_ih, b_hh), _, _ = make(cell)
    y, _, tape = forward(cell, x, state, (W, R, b_ih, b_hh))
    joined = np.concatenate([x, tape["h"][:-1]], axis=2)
    weights = np.concatenate([W, R], axis=1), np.zeros_like(R), b_ih + b_hh, None
    for t in range(T):  # each from the state before it, so that the h in [x h] is the true one
        before = tuple(tape[name][t] for name in CELLS[cell].states)
        one, _, _ = forward(cell, joined[t : t + 1], before, weights)
        assert_near(f"step {t}", one[0], y[t], 1e-14)


def test_gru_forms_differ_only_by_the_reset():
    """With r = 1 both forms of the GRU are the same function; with r free they are not."""
    x, state, (W, R, b_ih, b_hh), _, _ = make("gru")
    free = [forward(cell, x, state, (W, R, b_ih, b_hh))[0] for cell in GRUS]
    assert relative_error(*free) > 1e-2
    b_ih = np.concatenate([np.full(H, 1000.0), b_ih[H:]])  # sigmoid(1000) is 1 exactly
    open_ = [forward(cell, x, state, (W, R, b_ih, b_hh))[0] for cell in GRUS]
    assert relative_error(*open_) < 1e-15


GRUS = ("gru", "gru_reset_before")

# ----------------------------------------------------------------------- lengths and directions


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_with_a_length_is_a_short_sequence(cell, reverse):
    """Each row alone, cut to its length, gives the same results; zeros beyond; no NaN anywhere."""
    lengths = [2, 0, 4]
    x, state, weights, dy, dstate = make(cell, lengths=lengths)
    how = dict(lengths=lengths, reverse=reverse)
    y, state_n, tape = forward(cell, x, state, weights, **how)
    grads = backward(cell, x, tape, weights, dy, dstate, **how)
    sums = dict.fromkeys(CELLS[cell].parameters(), 0.0)
    for b, n in enumerate(lengths):
        cut = x[:n, b : b + 1], tuple(s[b : b + 1] for s in state), weights
        y_b, state_b, tape_b = forward(cell, *cut, reverse=reverse)
        dstate_b = tuple(s[b : b + 1] for s in dstate)
        grads_b = backward(
            cell, cut[0], tape_b, weights, dy[:n, b : b + 1], dstate_b, reverse=reverse
        )
        assert_near("y", y[:n, b], y_b[:, 0], 1e-14)
        assert_near("dx", grads["x"][:n, b], grads_b["x"][:, 0], 1e-14)
        assert not y[n:, b].any() and not grads["x"][n:, b].any()
        for i in range(len(state)):
            assert_near("state_n", state_n[i][b], state_b[i][0], 1e-14)
            assert_near("dstate", grads["state"][i][b], grads_b["state"][i][0], 1e-14)
            if n == 0:
                np.testing.assert_array_equal(state_n[i][b], state[i][b])
                np.testing.assert_array_equal(grads["state"][i][b], dstate[i][b])
        for name in CELLS[cell].parameters():
            sums[name] = sums[name] + grads_b[name]
    for name in CELLS[cell].parameters():
        assert_near(name, grads[name], sums[name], 1e-14)


@pytest.mark.parametrize("cell", CELLS)
def test_reverse_is_forward_on_the_flipped_sequence(cell):
    x, state, weights, dy, dstate = make(cell)
    y, state_n, tape = forward(cell, x, state, weights, reverse=True)
    y_f, state_f, tape_f = forward(cell, x[::-1], state, weights)
    np.testing.assert_array_equal(y, y_f[::-1])
    np.testing.assert_array_equal(state_n, state_f)
    grads = backward(cell, x, tape, weights, dy, dstate, reverse=True)
    grads_f = backward(cell, x[::-1], tape_f, weights, dy[::-1], dstate)
    np.testing.assert_array_equal(grads["x"], grads_f["x"][::-1])
    np.testing.assert_array_equal(grads["weight_hh"], grads_f["weight_hh"])


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps(cell):
    x, state, weights, dy, dstate = make(cell)
    y, state_n, tape = forward(cell, x[:0], state, weights)
    grads = backward(cell, x[:0], tape, weights, dy[:0], dstate)
    assert y.shape == (0, B, H)
    np.testing.assert_array_equal(state_n, state)
    np.testing.assert_array_equal(grads["state"], dstate)
    assert not any(grads[name].any() for name in CELLS[cell].parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_float32_stays_float32(cell):
    """Nothing in the reference widens its input: it is the plain NumPy of the third promise."""
    x, state, weights, dy, dstate = make(cell, lengths=RUNS["uneven"])
    x, dy = x.astype(np.float32), dy.astype(np.float32)
    state, weights, dstate = (
        tuple(a.astype(np.float32) for a in group) for group in (state, weights, dstate)
    )
    y, state_n, tape = forward(cell, x, state, weights, lengths=RUNS["uneven"])
    grads = backward(cell, x, tape, weights, dy, dstate, lengths=RUNS["uneven"])
    arrays = [y, *state_n, *(a for a in tape.values() if a is not None)]
    arrays += [grads["x"], *grads["state"], *(grads[name] for name in CELLS[cell].parameters())]
    assert {a.dtype for a in arrays} == {np.dtype(np.float32)}


def test_activations_at_the_ends():
    """No overflow warning, the right limits, NaN kept, and full relative accuracy at the left."""
    z = np.array([-np.inf, -1e30, -100.0, 0.0, 100.0, 1e30, np.inf])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        s = reference.sigmoid(z)
        reference.sigmoid(z.astype(np.float32))
    np.testing.assert_allclose(s, [0, 0, np.exp(-100), 0.5, 1, 1, 1], rtol=1e-15)
    assert np.isnan(reference.sigmoid(np.nan)) and np.isnan(reference.relu(np.nan))
    np.testing.assert_array_equal(reference.relu(z), np.maximum(z, 0))


# --------------------------------------------------------------------------------------- stacks


def make_stack(cell, L, D, *, bias, rng, merging="concat"):
    """Parameters of a stack, named as in torch.nn."""
    params, width = {}, H * (D if merging == "concat" else 1)
    for k in range(L):
        for end in ["", "_reverse"][:D]:
            weights = make_weights(cell, I if k == 0 else width, H, rng, bias=bias)
            named = zip(CELLS[cell].parameters(), weights, strict=True)
            params |= {f"{name}_l{k}{end}": w for name, w in named if w is not None}
    return params


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("lengths", [None, [3, 0, 4]], ids=["all valid", "with zero"])
@pytest.mark.parametrize(
    ("L", "D", "merging"),
    [(2, 1, "concat"), *((L, 2, kind) for L in (1, 3) for kind in MERGES)],
)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_stack_gradients(cell, L, D, merging, lengths, masked):
    rng = np.random.default_rng(3)
    params = make_stack(cell, L, D, bias=L != 2, rng=rng, merging=merging)
    n, Y = len(CELLS[cell].states), H * (D if merging == "concat" else 1)
    x, dy = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, Y))
    state = tuple(rng.standard_normal((L * D, B, H)) for _ in range(n))
    dstate = tuple(rng.standard_normal((L * D, B, H)) for _ in range(n))
    masks = [rng.integers(0, 2, (T, B, Y)) * 2.0 for _ in range(L - 1)] if masked else None
    how = dict(lengths=lengths, masks=masks, merging=merging)

    def f(x, *rest):
        named = dict(zip(params, rest[n:], strict=True))
        y, state_n, _ = stack_forward(cell, x, rest[:n], named, **how)
        return (y * dy).sum() + sum((s * d).sum() for s, d in zip(state_n, dstate, strict=True))

    _, _, tapes = stack_forward(cell, x, state, params, **how)
    got = stack_backward(cell, tapes, params, dy, dstate, **how)
    assert set(got) == {"x", "state", *params}
    # One direction of the space at a time would be slow: the derivative along a random vector.
    inputs = {"x": x} | {f"state {i}": s for i, s in enumerate(state)} | params
    for name, array in inputs.items():
        along = rng.standard_normal(array.shape)
        arrays = [a + 1j * STEP * along if a is array else a for a in inputs.values()]
        grad = got["state"][int(name[-1])] if name.startswith("state") else got[name]
        want = f(*arrays).imag / STEP
        assert (grad * along).sum() == pytest.approx(want, rel=1e-11, abs=1e-13), name


# -------------------------------------------------------------------------------------- dropout


def splitmix64(z):
    """The same bijection as `reference.mix`, on Python's own integers."""
    keep = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & keep
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & keep
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & keep
    return z ^ (z >> 31)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("key", [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**63, 7)])
def test_dropout_mask_element_by_element(key, p):
    mask = reference.dropout_mask(*key, 3, 4, 5, p)
    keep = 2**64 - 1
    k = 0
    for number in key:
        k = splitmix64((k + number) & keep)
    for t, b, unit in np.ndindex(3, 4, 5):
        row = splitmix64((k + (t << 32 | b)) & keep)
        element = splitmix64((row + unit) & keep)
        assert mask[t, b, unit] == ((element >> 11) * 2.0**-53 >= p)


def test_dropout_mask_keeps_its_share_and_differs():
    """Rates within 5 standard deviations; any other seed, call or layer gives another mask."""
    shape = (20, 10, 100)
    for p in (0.1, 0.5):
        rate = reference.dropout_mask(1, 2, 3, *shape, p).mean()
        assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / 20_000) ** 0.5
    masks = [
        reference.dropout_mask(*key, *shape, 0.5)
        for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs((one == other).mean() - 0.5) < 5 * 0.5 / 20_000**0.5
