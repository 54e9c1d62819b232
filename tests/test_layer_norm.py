"""Normalised layers against a plain loop of PyTorch's operations, and their options.

Knows the modules and, where it is installed, PyTorch, whose `layer_norm` and autograd judge values
and gradients of real sizes in float64; equations and kernels are judged in test_reference and
test_kernels.
"""

import pickle
from importlib.util import find_spec

import numpy as np
import pytest
from cases import as_tuple, make_module, options_of
from tolerances import TIMES_NUMPY, assert_close, assert_same_bits

import rnnfast
from rnnfast import functional, reference
from rnnfast.cells import CELLS

NORMALISED = [name for name, cell in CELLS.items() if cell.norms]
T, B, I, H = 9, 5, 7, 33


def random(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(cell, **others):
    """A module in float64, all of its parameters random, gains about 1."""
    module = make_module(cell, I, H, seed=1, dtype=np.float64, **others)
    rng = np.random.default_rng(2)
    for name, param in module.params.items():
        if "norm" in name or name.startswith("bias"):
            param[...] = rng.uniform(-0.5, 0.5, param.shape) + name.startswith("weight")
    return module


def theirs(torch, cell, x, states, params):
    """The layer's y and last states, step by step."""
    norm = torch.nn.functional.layer_norm
    p = {name.removesuffix("_l0"): value for name, value in params.items()}
    ys = []
    for x_t in x:
        h = states[0]
        W_x, R_h = x_t @ p["weight_ih"].T, h @ p["weight_hh"].T
        z_x = norm(W_x, W_x.shape[-1:], p["weight_norm_ih"], p["bias_ih"])
        z_h = norm(R_h, R_h.shape[-1:], p["weight_norm_hh"], p["bias_hh"])
        if cell.startswith("rnn"):
            states = ((torch.relu if "relu" in cell else torch.tanh)(z_x + z_h),)
        elif cell == "gru_norm":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = z_x.chunk(3, -1), z_h.chunk(3, -1)
            z = torch.sigmoid(x_z + h_z)
            n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
            states = ((1 - z) * n + z * h,)
        else:
            i, f, g, o = (z_x + z_h).chunk(4, -1)
            c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
            out = norm(c, c.shape[-1:], p["weight_norm_c"], p["bias_norm_c"])
            c = out if cell == "lstm_norm_cell" else c
            states = torch.sigmoid(o) * torch.tanh(out), c
        ys.append(states[0])
    return torch.stack(ys), states


@pytest.mark.parametrize("cell", NORMALISED)
def test_a_loop_in_pytorch(cell):
    if find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    import torch

    module, n = make(cell), len(CELLS[cell].states)
    x, dy = random(T, B, I), random(T, B, H, seed=1)
    state = tuple(random(1, B, H, seed=2 + k) for k in range(n))
    dstate = tuple(random(1, B, H, seed=4 + k) for k in range(n))
    y, state_n, tape = module.forward_train(x, state if n == 2 else state[0])
    dx, dstate_0 = module.backward(tape, dy, dstate if n == 2 else dstate[0])

    def leaf(array):
        return torch.tensor(array, requires_grad=True)

    x_, params = leaf(x), {name: leaf(p) for name, p in module.params.items()}
    states = [leaf(s[0]) for s in state]
    y_, last = theirs(torch, cell, x_, states, params)
    loss = (y_ * torch.tensor(dy)).sum()
    for s, d in zip(last, dstate, strict=True):
        loss = loss + (s * torch.tensor(d[0])).sum()
    loss.backward()
    assert_close("y", y, y_.detach().numpy(), np.float64, time_axis=0)
    assert_close("dx", dx, x_.grad.numpy(), np.float64, "gradient", time_axis=0)
    ends = zip(as_tuple(state_n), last, as_tuple(dstate_0), states, strict=True)
    for k, (got, want, got_d, want_d) in enumerate(ends):
        assert_close(f"state {k}", got[0], want.detach().numpy(), np.float64)
        assert_close(f"dstate {k}", got_d[0], want_d.grad.numpy(), np.float64, "gradient")
    for name, grad in module.grads.items():
        assert_close(name, grad, params[name].grad.numpy(), np.float64, "gradient")


@pytest.mark.parametrize("cell", NORMALISED)
def test_what_is_scaled_does_not_matter(cell):
    """Of x and W a factor is normalised away, but for epsilon: the point of it all."""
    module = make(cell)
    x = 100 * random(T, B, I)
    y, _ = module(x)
    module.params["weight_ih_l0"] *= 1000
    np.testing.assert_allclose(module(x)[0], y, rtol=0, atol=1e-6)
    module.params["weight_norm_ih_l0"] *= 1.5
    assert np.abs(module(x)[0] - y).max() > 1e-3


@pytest.mark.parametrize("cell", NORMALISED)
@pytest.mark.parametrize("equal", [12345.678, np.pi * 1e6, -1e15])
@pytest.mark.parametrize("size", [5, 1000])
def test_a_row_of_equal_numbers_becomes_zeros(cell, equal, size):
    """However its mean was rounded: the products come to nothing but their biases."""
    module = make_module(cell, 1, size, seed=1)
    y = [module(np.zeros((2, 1, 1), np.float32))[0]]
    module.params["weight_ih_l0"][...] = equal
    y.append(module(np.ones((2, 1, 1), np.float32))[0])
    assert_close("y", y[1], y[0], np.float32)


@pytest.mark.parametrize("mean", [10, 100, 1000])
@pytest.mark.parametrize("cell", ["rnn_tanh_norm", "gru_norm"])
def test_rows_far_from_zero_err_as_numpys(cell, mean):
    """Numbers that differ by far less than their mean: the promise of all kernels holds there."""
    B, H = 8, 1024
    module = make_module(cell, 1, H, seed=1)
    rng = np.random.default_rng(3)
    module.params["weight_ih_l0"][...] = mean + rng.standard_normal(
        module.params["weight_ih_l0"].shape
    )
    x = rng.uniform(0.5, 1, (1, B, 1)).astype(np.float32)
    y, _ = module(x)
    found = []
    for dtype in (np.float64, np.float32):
        own = {name: value.astype(dtype) for name, value in module.params.items()}
        found.append(reference.stack_forward(cell, x.astype(dtype), None, own)[0])
    ours, numpys = (np.linalg.norm(a - found[0]) for a in (y, found[1]))
    assert ours <= TIMES_NUMPY * numpys, ours / numpys


@pytest.mark.parametrize("cell", NORMALISED)
def test_initial_parameters(cell):
    kind, options = options_of(cell)
    module = make_module(cell, I, H, 2, bidirectional=True, seed=0)
    rows = len(CELLS[cell].gates) * H
    shapes = {"weight_norm_ih": (rows,), "weight_norm_hh": (rows,)}
    if kind == "lstm":
        shapes |= {"weight_norm_c": (H,), "bias_norm_c": (H,)}
    for end in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        for name, shape in shapes.items():
            assert module.params[name + end].shape == shape
    for name, param in module.params.items():
        if name.startswith("bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            assert 0 < np.abs(param).max() <= H**-0.5, name
    word = options["layer_norm"]
    assert module.layer_norm == word and f"layer_norm={word!r}" in repr(module)
    without = make_module(cell, I, H, bias=False)
    assert not any(name.startswith("bias") for name in without.params)


def test_forget_bias_is_the_gates_alone():
    lstm = rnnfast.LSTM(I, H, forget_bias=2, layer_norm="gates")
    bias_ih = lstm.params["bias_ih_l0"]
    assert (bias_ih[H : 2 * H] == 2).all() and not bias_ih[:H].any() and not bias_ih[2 * H :].any()
    assert not lstm.params["bias_hh_l0"].any() and not lstm.params["bias_norm_c_l0"].any()


@pytest.mark.parametrize("cell", NORMALISED)
def test_files_and_pickles(cell, tmp_path):
    module = make(cell, bias=False)
    module.save(tmp_path / "saved")
    x = random(T, B, I)
    for other in (rnnfast.load(tmp_path / "saved"), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert_same_bits("y", other(x)[0], module(x)[0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_pickles_of_the_version_before(kind):
    module = getattr(rnnfast, kind)(I, H, seed=1)
    state = module.__getstate__()
    state["arguments"] = {k: v for k, v in state["arguments"].items() if k != "layer_norm"}
    other = type(module).__new__(type(module))
    other.__setstate__(state)
    assert other.layer_norm is None
    assert_same_bits("flat", other.flat, module.flat)


@pytest.mark.parametrize("cell", ["lstm_norm", "lstm_norm_cell"])
@pytest.mark.parametrize("tape", ["full", "light"])
def test_stacks_streams_and_projections(cell, tape):
    """A stack, light or not, gives what its layers give one by one; so does its stream."""
    P = 6
    module = make_module(cell, I, H, 2, proj_size=P, seed=3)
    x = random(40, B, I, dtype=np.float32)
    y, _, kept = module.forward_train(x, tape=tape)
    dx, _ = module.backward(kept, np.ones_like(y))
    below, (h, c) = x, (np.zeros((1, B, P), np.float32), np.zeros((1, B, H), np.float32))
    options = options_of(cell)[1]
    tapes = []
    for layer in range(2):
        weights = tuple(p for name, p in module.params.items() if name.endswith(f"_l{layer}"))
        below, _, one = functional.lstm_forward(below, (h, c), weights, **options)
        tapes.append((one, weights, layer))
    assert_same_bits("y", y, below)
    dy = np.ones_like(y)
    for one, weights, layer in reversed(tapes):
        grads = functional.lstm_backward(one, weights, dy, None, **options)
        dy = grads.x
        names = [name for name in module.grads if name.endswith(f"_l{layer}")]
        for name, grad in zip(names, grads.weights, strict=True):
            assert_same_bits(name, module.grads[name], grad)
    assert_same_bits("dx", dx, dy)
    stream = module.stream(B)
    assert_same_bits("stream", stream.process(x), y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rnnfast.LSTM(2, 3, layer_norm="cell"), "'cell'; needs None or 'gates' or "),
        (lambda: rnnfast.GRU(2, 3, layer_norm="gates+cell"), r".*; needs None or 'gates'$"),
        (
            lambda: rnnfast.LSTM(2, 3, layer_norm="gates", peephole=True),
            "'gates' with peephole=True; needs None, or peephole=False",
        ),
        (
            lambda: rnnfast.LSTM(2, 3, layer_norm="gates+cell", coupled=True),
            r"'gates\+cell' with coupled=True",
        ),
        (
            lambda: rnnfast.GRU(2, 3, layer_norm="gates", reset_after=False),
            "'gates' with reset_after=False; needs None, or reset_after=True",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^layer_norm: got {message}"):
        call()


def test_words_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"^layer_norm: got True; needs None or 'gates'"):
        rnnfast.RNN(2, 3, layer_norm=True)


def test_weights_are_counted():
    x, plain = random(T, B, I), tuple(rnnfast.LSTM(I, H, dtype=np.float64).params.values())
    match = r"^weights: .*; needs \(W, R, b_ih, b_hh, g_ih, g_hh, g_c, b_c\) or"
    with pytest.raises(ValueError, match=match):
        functional.lstm_forward(x, None, plain, layer_norm="gates")
    weights = list(make("lstm_norm").params.values())
    functional.lstm_forward(x, None, (*weights[:7], None), layer_norm="gates")
    weights[6] = weights[6][:-1]
    with pytest.raises(ValueError, match=r"^weights \(g_c\): got shape .*; needs"):
        functional.lstm_forward(x, None, tuple(weights), layer_norm="gates")
