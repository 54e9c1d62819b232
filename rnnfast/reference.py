"""The truth: every equation of rnnfast once, forward and backward through time, in plain NumPy.

Knows NumPy only and imports nothing of ours, so that it cannot share a mistake with the kernels it
judges. Leaves speed, threads, checks of arguments and messages to the other files.

How to read it. A *step* maps one x and the states before it to the states after it; below, each
cell is a pair of functions, the step and its derivative. A *walk* visits the steps of a sequence
in the order of processing. `forward` is a walk over steps, keeping what the derivatives need (the
*tape*); `backward` is the same walk from its end, by the chain rule. `stack_forward` and
`stack_backward` pile up layers and directions.

T steps, B batch, I input size, H hidden size, G gates, Gt gates on the tape, L layers,
D directions. W is `weight_ih` [G*H, I], R is `weight_hh` [G*H, H]; gates, signs and the two biases
are PyTorch's. z is a gate before its squashing function, dv the gradient of the loss by v.
`n` in a shape is the number of rows that are still running at a step.

Any dtype works: float32 is computed in float32, and every function here is analytic also for
complex numbers (no abs, no conj), which gives derivatives by the complex step, exact to rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------------------------- activations


def tanh(z):
    """Hyperbolic tangent; its derivative is (1 - h)(1 + h) where h = tanh(z).

    >>> float(tanh(0.0))
    0.0
    """
    return np.tanh(z)


def sigmoid(z):
    """1 / (1 + exp(-z)), without overflow; its derivative is s(1 - s) where s = sigmoid(z).

    exp is taken of -|z|, |.| by the sign of the real part: both branches are the same function.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    z = np.asarray(z)
    negative = z.real < 0
    e = np.exp(np.where(negative, z, -z))
    return np.where(negative, e, 1) / (1 + e)


def relu(z):
    """z where it is positive, 0 elsewhere; a NaN stays.

    >>> relu(np.array([-2.0, 3.0, np.nan])).tolist()
    [0.0, 3.0, nan]
    """
    z = np.asarray(z)
    return np.where(z.real <= 0, 0, z)


def relu_slope(z):
    z = np.asarray(z)
    return _real(np.where(z.real <= 0, 0, 1), z)


def tanh_slope(z):
    t = np.tanh(z)
    return (1 - t) * (1 + t)


def sigmoid_slope(z):
    s = sigmoid(z)
    return s * (1 - s)


def _real(slope, z):
    """Constants of a piecewise function, in the precision of z."""
    return np.asarray(slope).astype(np.asarray(z).real.dtype)


def affine(z, alpha=1.0, beta=0.0):
    """alpha z + beta."""
    return alpha * z + beta


def affine_slope(z, alpha=1.0, beta=0.0):
    return _real(np.full(np.shape(z), alpha), z)


def leakyrelu(z, alpha=0.01):
    """z where it is positive, alpha z elsewhere."""
    z = np.asarray(z)
    return np.where(z.real <= 0, alpha * z, z)


def leakyrelu_slope(z, alpha=0.01):
    z = np.asarray(z)
    return _real(np.where(z.real <= 0, alpha, 1), z)


def thresholdedrelu(z, alpha=1.0):
    """z from alpha on, 0 below; what it jumps there has no gradient.

    >>> thresholdedrelu(np.array([0.5, 1.0, 2.0])).tolist()
    [0.0, 1.0, 2.0]
    """
    z = np.asarray(z)
    return np.where(z.real < alpha, 0, z)


def thresholdedrelu_slope(z, alpha=1.0):
    z = np.asarray(z)
    return _real(np.where(z.real < alpha, 0, 1), z)


def scaledtanh(z, alpha=1.0, beta=1.0):
    """alpha tanh(beta z)."""
    return alpha * tanh(beta * z)


def scaledtanh_slope(z, alpha=1.0, beta=1.0):
    return alpha * beta * tanh_slope(beta * z)


def hardsigmoid(z, alpha=0.2, beta=0.5):
    """alpha z + beta, held within 0 and 1.

    >>> hardsigmoid(np.array([-3.0, 0.0, 3.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    v = np.asarray(alpha * z + beta)
    return np.where(v.real <= 0, 0, np.where(v.real >= 1, 1, v))


def hardsigmoid_slope(z, alpha=0.2, beta=0.5):
    v = np.asarray(alpha * z + beta)
    return _real(np.where((v.real <= 0) | (v.real >= 1), 0, alpha), z)


def elu(z, alpha=1.0):
    """z where it is positive, alpha (exp(z) - 1) elsewhere."""
    z = np.asarray(z)
    return np.where(z.real > 0, z, alpha * np.expm1(np.where(z.real > 0, 0, z)))


def elu_slope(z, alpha=1.0):
    z = np.asarray(z)
    return np.where(z.real > 0, 1, alpha * np.exp(np.where(z.real > 0, 0, z)))


def softsign(z):
    """z / (1 + |z|), |.| by the sign of the real part; 1 and -1 at the infinities.

    >>> softsign(np.array([-1.0, 0.0, np.inf])).tolist()
    [-0.5, 0.0, 1.0]
    """
    z = np.asarray(z)
    far = np.isinf(z.real)
    near = np.where(far, 1, z)
    return np.where(far, np.sign(z.real), near / (1 + np.where(near.real < 0, -near, near)))


def softsign_slope(z):
    z = np.asarray(z)
    return 1 / (1 + np.where(z.real < 0, -z, z)) ** 2


def softplus(z):
    """log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|)), without overflow.

    >>> softplus(np.array([-1000.0, 1000.0])).tolist()
    [0.0, 1000.0]
    """
    z = np.asarray(z)
    negative = z.real < 0
    return np.where(negative, 0, z) + np.log1p(np.exp(np.where(negative, z, -z)))


# By ONNX's names, in lower case: the function, and its derivative by z. The defaults are those of
# ONNX's operators of these names; affine and scaledtanh have no such operator. At a kink the
# derivative is that of the left, at a jump of the right; at both limits of hardsigmoid it is 0.
ACTIVATIONS = {
    "sigmoid": (sigmoid, sigmoid_slope),
    "tanh": (tanh, tanh_slope),
    "relu": (relu, relu_slope),
    "affine": (affine, affine_slope),
    "leakyrelu": (leakyrelu, leakyrelu_slope),
    "thresholdedrelu": (thresholdedrelu, thresholdedrelu_slope),
    "scaledtanh": (scaledtanh, scaledtanh_slope),
    "hardsigmoid": (hardsigmoid, hardsigmoid_slope),
    "elu": (elu, elu_slope),
    "softsign": (softsign, softsign_slope),
    "softplus": (softplus, sigmoid),
}


class Functions(NamedTuple):
    """What a general cell computes with.

    activations: f of an RNN, f, g of a GRU, f, g, h of an LSTM, each a name in ACTIVATIONS, or
    (name, alpha), or (name, alpha, beta); clip: what f and g are taken of is held within -clip and
    clip; cell_clip: so is the new c of an LSTM; None: no limit.
    """

    activations: tuple
    clip: float | None = None
    cell_clip: float | None = None


def clipped(z, limit):
    """z, held within -limit and limit; a NaN stays, and None is no limit.

    >>> clipped(np.array([-2.0, 0.5, 2.0]), 1.0).tolist()
    [-1.0, 0.5, 1.0]
    """
    if limit is None:
        return z
    z = np.asarray(z)
    return np.where(z.real > limit, limit, np.where(z.real < -limit, -limit, z))


def cut(d, z, limit):
    """The gradient d by clipped(z, limit), as one by z: none where the limit has changed z."""
    return d if limit is None else np.where(np.abs(z) > limit, 0, d)


def activate(activation, z, clip):
    """An activation as `Functions` names it, of a clipped z.

    >>> activate(("leakyrelu", 0.5), np.array([-4.0, 1.0]), 2.0).tolist()
    [-1.0, 1.0]
    """
    name, *parameters = (activation,) if isinstance(activation, str) else activation
    return ACTIVATIONS[name][0](clipped(z, clip), *parameters)


def slope(activation, z, clip):
    """The derivative of `activate` by z."""
    name, *parameters = (activation,) if isinstance(activation, str) else activation
    return cut(ACTIVATIONS[name][1](clipped(z, clip), *parameters), z, clip)


# ---------------------------------------------------------------------------------------- cells
#
# A step:       x [n, I], states before (each [n, H]), weights -> states after, gates for the tape.
# Its backward: d(states after), gates, states before, states after, R
#               -> dz_x, dz_h [n, G*H], d(states before), dR [G*H, H]
# Where a cell has weights of single units, as peepholes P [p*H], they are the last arguments of
# both, and their gradients the last results of the latter. A normalised cell adds its biases after
# the normalisation: they too are arguments of its backward, before the others, and have gradients.
# Where h goes past the products, too (a GRU's), the states before may be (h, seen): the h that goes
# past, and the one that R multiplies; d(states before) is then of both.
# where z_x = x W^T + b_ih is what comes from the input and z_h = h R^T + b_hh what comes from the
# state. The input's side is the same for all cells and left to `backward`:
# dx = dz_x W, dW = dz_x^T x, db_ih = sum(dz_x), db_hh = sum(dz_h).
#
# A general cell is one of the others with any activations and clips, its `Functions`, which both
# take by name. Its tape has z, before it is clipped, instead of gates: at a kink, or where a gate
# has saturated, a gate's value does not tell its derivative.


def split(z, gates):
    """Cuts z [n, G*H] into its gates, G arrays [n, H] (or weights [G*H, ...] by way of rows).

    >>> [part.tolist() for part in split(np.array([[1, 2, 3, 4]]), 2)]
    [[[1, 2]], [[3, 4]]]
    """
    return np.split(z, gates, axis=1)


def join(*gates):
    """The opposite of `split`.

    >>> join(np.array([[1, 2]]), np.array([[3, 4]])).tolist()
    [[1, 2, 3, 4]]
    """
    return np.concatenate(gates, axis=1)


def rnn_tanh_step(x, before, W, R, b_ih, b_hh):
    """h' = tanh(W x + b_ih + R h + b_hh) (Elman, "Finding structure in time", 1990)."""
    (h,) = before
    h_new = tanh(x @ W.T + b_ih + h @ R.T + b_hh)
    return (h_new,), ()


def rnn_tanh_step_backward(d_after, gates, before, after, R):
    (dh_new,), (h,), (h_new,) = d_after, before, after
    dz = dh_new * (1 - h_new) * (1 + h_new)
    return dz, dz, (dz @ R,), dz.T @ h


def rnn_relu_step(x, before, W, R, b_ih, b_hh):
    """h' = relu(W x + b_ih + R h + b_hh) (Le, Jaitly, Hinton, arXiv 1504.00941)."""
    (h,) = before
    h_new = relu(x @ W.T + b_ih + h @ R.T + b_hh)
    return (h_new,), ()


def rnn_relu_step_backward(d_after, gates, before, after, R):
    (dh_new,), (h,), (h_new,) = d_after, before, after
    dz = np.where(h_new.real <= 0, 0, dh_new)
    return dz, dz, (dz @ R,), dz.T @ h


def lstm_step(x, before, W, R, b_ih, b_hh):
    """Long short-term memory with a forget gate.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber and Cummins,
    "Learning to forget", 2000; gate order i f g o as in torch.nn.LSTM.
    """
    h, c = before
    z_i, z_f, z_g, z_o = split(x @ W.T + b_ih + h @ R.T + b_hh, 4)
    i, f, g, o = sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)
    c_new = f * c + i * g
    h_new = o * tanh(c_new)
    return (h_new, c_new), (i, f, g, o)


def lstm_step_backward(d_after, gates, before, after, R):
    (dh_new, dc_new), (i, f, g, o), (h, c), (_, c_new) = d_after, gates, before, after
    tanh_c = tanh(c_new)
    dc = dc_new + dh_new * o * (1 - tanh_c) * (1 + tanh_c)  # c' goes on, and into h'
    dz_i = dc * g * i * (1 - i)
    dz_f = dc * c * f * (1 - f)
    dz_g = dc * i * (1 - g) * (1 + g)
    dz_o = dh_new * tanh_c * o * (1 - o)
    dz = join(dz_i, dz_f, dz_g, dz_o)
    return dz, dz, (dz @ R, dc * f), dz.T @ h


def lstm_peephole_step(x, before, W, R, b_ih, b_hh, P):
    """LSTM whose gates see c: i and f the one before the step, o the one after it.

    Gers and Schmidhuber, "Recurrent nets that time and count", 2000; P is p_i, p_f, p_o.
    """
    h, c = before
    p_i, p_f, p_o = np.split(P, 3)
    z_i, z_f, z_g, z_o = split(x @ W.T + b_ih + h @ R.T + b_hh, 4)
    i, f, g = sigmoid(z_i + p_i * c), sigmoid(z_f + p_f * c), tanh(z_g)
    c_new = f * c + i * g
    o = sigmoid(z_o + p_o * c_new)
    h_new = o * tanh(c_new)
    return (h_new, c_new), (i, f, g, o)


def lstm_peephole_step_backward(d_after, gates, before, after, R, P):
    (dh_new, dc_new), (i, f, g, o), (h, c), (_, c_new) = d_after, gates, before, after
    p_i, p_f, p_o = np.split(P, 3)
    tanh_c = tanh(c_new)
    dz_o = dh_new * tanh_c * o * (1 - o)
    dc = dc_new + dh_new * o * (1 - tanh_c) * (1 + tanh_c) + dz_o * p_o
    dz_i = dc * g * i * (1 - i)
    dz_f = dc * c * f * (1 - f)
    dz_g = dc * i * (1 - g) * (1 + g)
    dz = join(dz_i, dz_f, dz_g, dz_o)
    dP = join(dz_i * c, dz_f * c, dz_o * c_new).sum(axis=0)
    return dz, dz, (dz @ R, dc * f + dz_i * p_i + dz_f * p_f), dz.T @ h, dP


def lstm_coupled_step(x, before, W, R, b_ih, b_hh):
    """LSTM that forgets what it takes in: f = 1 - i, gate order i g o.

    The variant "CIFG" of Greff et al., "LSTM: a search space odyssey", arXiv 1503.04069; ONNX's
    input_forget.
    """
    h, c = before
    z_i, z_g, z_o = split(x @ W.T + b_ih + h @ R.T + b_hh, 3)
    i, g, o = sigmoid(z_i), tanh(z_g), sigmoid(z_o)
    c_new = (1 - i) * c + i * g
    h_new = o * tanh(c_new)
    return (h_new, c_new), (i, g, o)


def lstm_coupled_step_backward(d_after, gates, before, after, R):
    (dh_new, dc_new), (i, g, o), (h, c), (_, c_new) = d_after, gates, before, after
    tanh_c = tanh(c_new)
    dc = dc_new + dh_new * o * (1 - tanh_c) * (1 + tanh_c)
    dz_i = dc * (g - c) * i * (1 - i)
    dz_g = dc * i * (1 - g) * (1 + g)
    dz_o = dh_new * tanh_c * o * (1 - o)
    dz = join(dz_i, dz_g, dz_o)
    return dz, dz, (dz @ R, dc * (1 - i)), dz.T @ h


def lstm_coupled_peephole_step(x, before, W, R, b_ih, b_hh, P):
    """Both: f = 1 - i, where i sees the c before the step and o the one after; P is p_i, p_o."""
    h, c = before
    p_i, p_o = np.split(P, 2)
    z_i, z_g, z_o = split(x @ W.T + b_ih + h @ R.T + b_hh, 3)
    i, g = sigmoid(z_i + p_i * c), tanh(z_g)
    c_new = (1 - i) * c + i * g
    o = sigmoid(z_o + p_o * c_new)
    h_new = o * tanh(c_new)
    return (h_new, c_new), (i, g, o)


def lstm_coupled_peephole_step_backward(d_after, gates, before, after, R, P):
    (dh_new, dc_new), (i, g, o), (h, c), (_, c_new) = d_after, gates, before, after
    p_i, p_o = np.split(P, 2)
    tanh_c = tanh(c_new)
    dz_o = dh_new * tanh_c * o * (1 - o)
    dc = dc_new + dh_new * o * (1 - tanh_c) * (1 + tanh_c) + dz_o * p_o
    dz_i = dc * (g - c) * i * (1 - i)
    dz_g = dc * i * (1 - g) * (1 + g)
    dz = join(dz_i, dz_g, dz_o)
    dP = join(dz_i * c, dz_o * c_new).sum(axis=0)
    return dz, dz, (dz @ R, dc * (1 - i) + dz_i * p_i), dz.T @ h, dP


def apart(before, dh, d_seen):
    """Gradients by the h that goes past R and the one that R sees, of a cell given both."""
    return (dh, d_seen) if len(before) == 2 else (dh + d_seen,)


def gru_step(x, before, W, R, b_ih, b_hh):
    """Gated recurrent unit, reset after the product: r scales R_n h + b_hn, kept as `hn`.

    Cho et al., arXiv 1406.1078, in the form of torch.nn.GRU; gate order r z n.
    """
    h, seen = before[0], before[-1]
    x_r, x_z, x_n = split(x @ W.T + b_ih, 3)
    h_r, h_z, hn = split(seen @ R.T + b_hh, 3)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = tanh(x_n + r * hn)
    h_new = (1 - z) * n + z * h
    return (h_new,), (r, z, n, hn)


def gru_step_backward(d_after, gates, before, after, R):
    (dh_new,), (r, z, n, hn), h, seen = d_after, gates, before[0], before[-1]
    dz_n = dh_new * (1 - z) * (1 - n) * (1 + n)
    dz_z = dh_new * (h - n) * z * (1 - z)
    dz_r = dz_n * hn * r * (1 - r)
    dz_x = join(dz_r, dz_z, dz_n)
    dz_h = join(dz_r, dz_z, dz_n * r)  # between R_n h and n stands r: here x and h differ
    dh, d_seen = dh_new * z, dz_h @ R  # h reaches h' directly, past every product, and through R
    return dz_x, dz_h, apart(before, dh, d_seen), dz_h.T @ seen


def gru_reset_before_step(x, before, W, R, b_ih, b_hh):
    """Gated recurrent unit, reset before the product: R_n multiplies r h, so r is needed first.

    Cho et al., arXiv 1406.1078; ONNX's GRU with linear_before_reset = 0; gate order r z n.
    """
    h, seen = before[0], before[-1]
    H = h.shape[1]
    R_rz, R_n = R[: 2 * H], R[2 * H :]
    z_rz, z_n = np.split(x @ W.T + b_ih + b_hh, [2 * H], axis=1)
    z_r, z_z = split(z_rz + seen @ R_rz.T, 2)
    r, z = sigmoid(z_r), sigmoid(z_z)
    n = tanh(z_n + (r * seen) @ R_n.T)
    h_new = (1 - z) * n + z * h
    return (h_new,), (r, z, n)


def gru_reset_before_step_backward(d_after, gates, before, after, R):
    (dh_new,), (r, z, n), h, seen = d_after, gates, before[0], before[-1]
    H = h.shape[1]
    R_rz, R_n = R[: 2 * H], R[2 * H :]
    dz_n = dh_new * (1 - z) * (1 - n) * (1 + n)
    dz_z = dh_new * (h - n) * z * (1 - z)
    drh = dz_n @ R_n  # by r h, the operand of R_n
    dz_r = drh * seen * r * (1 - r)
    dz_rz = join(dz_r, dz_z)
    dz = join(dz_rz, dz_n)
    dh, d_seen = dh_new * z, drh * r + dz_rz @ R_rz
    dR = np.concatenate([dz_rz.T @ seen, dz_n.T @ (r * seen)])
    return dz, dz, apart(before, dh, d_seen), dR


# Layer normalisation within the recurrence, of Ba, Kiros and Hinton, "Layer normalization", arXiv
# 1607.06450 (equations 20 to 31), in the form of the library haste: what comes from x and what
# comes from h are normalised apart, each over all numbers of its row, the gates' together, and each
# has gains g of its own, but the plain biases: z = g_ih LN(W x) + b_ih + g_hh LN(R h) + b_hh.

EPSILON = 1e-5  # PyTorch's default; under the root, so that a row of equal numbers becomes zeros


def normalise(v):
    """LN(v) = (v - mean) / sqrt(var + EPSILON) over each row, var being the biased one.

    Returns it, and 1 / sqrt(var + EPSILON), which `normalise_backward` wants.

    >>> normalise(np.array([[1.0, 3.0], [2.0, 2.0]]))[0].round(3).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    centred = v - v.mean(axis=1, keepdims=True)
    centred = centred - centred.mean(axis=1, keepdims=True)  # what the mean's rounding left
    scale = 1 / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + EPSILON)
    return centred * scale, scale


def normalise_backward(d_normal, normal, scale):
    """The gradient by v, of the results of `normalise`: mean and var depend on v as well."""
    d_mean = d_normal.mean(axis=1, keepdims=True)
    d_var = (d_normal * normal).mean(axis=1, keepdims=True)
    return scale * (d_normal - d_mean - normal * d_var)


def normal_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh):
    """z_x and z_h of W x and R h."""
    return normalise(raw_x)[0] * g_ih + b_ih, normalise(raw_h)[0] * g_hh + b_hh


def normal_gates_backward(dz_x, dz_h, raw_x, raw_h, g_ih, g_hh):
    """Gradients by W x, R h, b_ih, b_hh, g_ih and g_hh, of those by z_x and z_h."""
    normal_x, scale_x = normalise(raw_x)
    normal_h, scale_h = normalise(raw_h)
    return (
        normalise_backward(dz_x * g_ih, normal_x, scale_x),
        normalise_backward(dz_h * g_hh, normal_h, scale_h),
        dz_x.sum(axis=0),
        dz_h.sum(axis=0),
        (dz_x * normal_x).sum(axis=0),
        (dz_h * normal_h).sum(axis=0),
    )


def rnn_tanh_norm_step(x, before, W, R, b_ih, b_hh, g_ih, g_hh):
    """h' = tanh(z)."""
    (h,) = before
    raw = x @ W.T, h @ R.T
    z_x, z_h = normal_gates(*raw, b_ih, b_hh, g_ih, g_hh)
    return (tanh(z_x + z_h),), raw


def rnn_tanh_norm_step_backward(d_after, gates, before, after, R, b_ih, b_hh, g_ih, g_hh):
    (dh_new,), (h,), (h_new,) = d_after, before, after
    dz = dh_new * (1 - h_new) * (1 + h_new)
    d_x, d_h, *d_more = normal_gates_backward(dz, dz, *gates, g_ih, g_hh)
    return d_x, d_h, (d_h @ R,), d_h.T @ h, *d_more


def rnn_relu_norm_step(x, before, W, R, b_ih, b_hh, g_ih, g_hh):
    """h' = relu(z)."""
    (h,) = before
    raw = x @ W.T, h @ R.T
    z_x, z_h = normal_gates(*raw, b_ih, b_hh, g_ih, g_hh)
    return (relu(z_x + z_h),), raw


def rnn_relu_norm_step_backward(d_after, gates, before, after, R, b_ih, b_hh, g_ih, g_hh):
    (dh_new,), (h,), (h_new,) = d_after, before, after
    dz = np.where(h_new.real <= 0, 0, dh_new)
    d_x, d_h, *d_more = normal_gates_backward(dz, dz, *gates, g_ih, g_hh)
    return d_x, d_h, (d_h @ R,), d_h.T @ h, *d_more


def lstm_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh):
    z_x, z_h = normal_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    z_i, z_f, z_g, z_o = split(z_x + z_h, 4)
    return sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)


def lstm_norm_step(x, before, W, R, b_ih, b_hh, g_ih, g_hh, g_c, b_c):
    """LSTM with normalised gates, and a c that is normalised on its way out: the c that goes on to
    the next step is not (Ba et al., equations 20 to 22; h' = o tanh(g_c LN(c') + b_c)).
    """
    h, c = before
    raw_x, raw_h = x @ W.T, h @ R.T
    i, f, g, o = lstm_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    c_new = f * c + i * g
    h_new = o * tanh(normalise(c_new)[0] * g_c + b_c)
    return (h_new, c_new), (*split(raw_x, 4), *split(raw_h, 4))


def lstm_norm_step_backward(
    d_after, gates, before, after, R, b_ih, b_hh, g_ih, g_hh, g_c, b_c
):  # fmt: skip
    (dh_new, dc_new), (h, c), (_, c_new) = d_after, before, after
    raw_x, raw_h = join(*gates[:4]), join(*gates[4:])
    i, f, g, o = lstm_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    normal, scale = normalise(c_new)
    tanh_c = tanh(normal * g_c + b_c)
    d_out = dh_new * o * (1 - tanh_c) * (1 + tanh_c)
    dc = dc_new + normalise_backward(d_out * g_c, normal, scale)
    dz_i = dc * g * i * (1 - i)
    dz_f = dc * c * f * (1 - f)
    dz_g = dc * i * (1 - g) * (1 + g)
    dz_o = dh_new * tanh_c * o * (1 - o)
    dz = join(dz_i, dz_f, dz_g, dz_o)
    d_x, d_h, *d_more = normal_gates_backward(dz, dz, raw_x, raw_h, g_ih, g_hh)
    d_norm = (d_out * normal).sum(axis=0), d_out.sum(axis=0)
    return d_x, d_h, (d_h @ R, dc * f), d_h.T @ h, *d_more, *d_norm


def lstm_norm_cell_step(x, before, W, R, b_ih, b_hh, g_ih, g_hh, g_c, b_c):
    """LSTM with normalised gates and a normalised c, which also goes on to the next step:
    c' = g_c LN(f c + i g) + b_c, h' = o tanh(c'), as LayerNormLSTMCell of PyTorch's example
    benchmarks/fastrnns/custom_lstms.py.
    """
    h, c = before
    raw_x, raw_h = x @ W.T, h @ R.T
    i, f, g, o = lstm_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    c_new = normalise(f * c + i * g)[0] * g_c + b_c
    h_new = o * tanh(c_new)
    return (h_new, c_new), (*split(raw_x, 4), *split(raw_h, 4))


def lstm_norm_cell_step_backward(
    d_after, gates, before, after, R, b_ih, b_hh, g_ih, g_hh, g_c, b_c
):  # fmt: skip
    (dh_new, dc_new), (h, c), (_, c_new) = d_after, before, after
    raw_x, raw_h = join(*gates[:4]), join(*gates[4:])
    i, f, g, o = lstm_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    normal, scale = normalise(f * c + i * g)
    tanh_c = tanh(c_new)
    d_out = dc_new + dh_new * o * (1 - tanh_c) * (1 + tanh_c)  # by c', after the normalisation
    dc = normalise_backward(d_out * g_c, normal, scale)
    dz_i = dc * g * i * (1 - i)
    dz_f = dc * c * f * (1 - f)
    dz_g = dc * i * (1 - g) * (1 + g)
    dz_o = dh_new * tanh_c * o * (1 - o)
    dz = join(dz_i, dz_f, dz_g, dz_o)
    d_x, d_h, *d_more = normal_gates_backward(dz, dz, raw_x, raw_h, g_ih, g_hh)
    d_norm = (d_out * normal).sum(axis=0), d_out.sum(axis=0)
    return d_x, d_h, (d_h @ R, dc * f), d_h.T @ h, *d_more, *d_norm


def gru_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh):
    z_x, z_h = normal_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    x_r, x_z, x_n = split(z_x, 3)
    h_r, h_z, hn = split(z_h, 3)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    return r, z, tanh(x_n + r * hn), hn


def gru_norm_step(x, before, W, R, b_ih, b_hh, g_ih, g_hh):
    """GRU, reset after the product, of normalised products: hn = g_hn LN(R h)_n + b_hn."""
    h, seen = before[0], before[-1]
    raw_x, raw_h = x @ W.T, seen @ R.T
    _, z, n, _ = gru_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    h_new = (1 - z) * n + z * h
    return (h_new,), (*split(raw_x, 3), *split(raw_h, 3))


def gru_norm_step_backward(d_after, gates, before, after, R, b_ih, b_hh, g_ih, g_hh):
    (dh_new,), h, seen = d_after, before[0], before[-1]
    raw_x, raw_h = join(*gates[:3]), join(*gates[3:])
    r, z, n, hn = gru_norm_gates(raw_x, raw_h, b_ih, b_hh, g_ih, g_hh)
    dz_n = dh_new * (1 - z) * (1 - n) * (1 + n)
    dz_z = dh_new * (h - n) * z * (1 - z)
    dz_r = dz_n * hn * r * (1 - r)
    dz_x, dz_h = join(dz_r, dz_z, dz_n), join(dz_r, dz_z, dz_n * r)
    d_x, d_h, *d_more = normal_gates_backward(dz_x, dz_h, raw_x, raw_h, g_ih, g_hh)
    return d_x, d_h, apart(before, dh_new * z, d_h @ R), d_h.T @ seen, *d_more


def rnn_general_step(x, before, W, R, b_ih, b_hh, *, functions):
    """h' = f(W x + b_ih + R h + b_hh); ONNX's RNN with its activations and clip."""
    (h,), ((f,), clip, _) = before, functions
    z = x @ W.T + b_ih + h @ R.T + b_hh
    return (activate(f, z, clip),), (z,)


def rnn_general_step_backward(d_after, gates, before, after, R, *, functions):
    (dh_new,), (z,), (h,), ((f,), clip, _) = d_after, gates, before, functions
    dz = dh_new * slope(f, z, clip)
    return dz, dz, (dz @ R,), dz.T @ h


def seen(z, p, c):
    """z with what a peephole p adds of c; z alone, if there is none."""
    return z if p is None else z + p * c


def lstm_general_step(x, before, W, R, b_ih, b_hh, P=None, *, functions, coupled=False):
    """An LSTM and its variants, with activations f of i, f and o, g of g, and h of c.

    ONNX's LSTM with its activations, clip, peepholes and input_forget. ONNX says that clip is
    applied "to the input of activations"; as in ONNX Runtime, these are the gates' alone, and c is
    not clipped for h. cell_clip bounds c itself, before o and h' see it (Sak, Senior and Beaufays,
    arXiv 1402.1128; tf.compat.v1.nn.rnn_cell.LSTMCell).
    """
    h, c = before
    (f_, g_, h_), clip, cell_clip = functions
    p_i, *p_f, p_o = np.split(P, 3 - coupled) if P is not None else [None] * (3 - coupled)
    z_i, *z_f, z_g, z_o = split(x @ W.T + b_ih + h @ R.T + b_hh, 4 - coupled)
    z_i, z_f = seen(z_i, p_i, c), [seen(z_f[0], p_f[0], c)] if z_f else []
    i, g = activate(f_, z_i, clip), activate(g_, z_g, clip)
    f = activate(f_, z_f[0], clip) if z_f else 1 - i
    c_new = clipped(f * c + i * g, cell_clip)
    z_o = seen(z_o, p_o, c_new)
    h_new = activate(f_, z_o, clip) * activate(h_, c_new, None)
    return (h_new, c_new), (z_i, *z_f, z_g, z_o)


def lstm_general_step_backward(
    d_after, gates, before, after, R, P=None, *, functions, coupled=False
):
    (dh_new, dc_new), (z_i, *z_f, z_g, z_o), (h, c), (_, c_new) = d_after, gates, before, after
    (f_, g_, h_), clip, cell_clip = functions
    p_i, *p_f, p_o = np.split(P, 3 - coupled) if P is not None else [None] * (3 - coupled)
    i, g, o = activate(f_, z_i, clip), activate(g_, z_g, clip), activate(f_, z_o, clip)
    f = activate(f_, z_f[0], clip) if z_f else 1 - i
    dz_o = dh_new * activate(h_, c_new, None) * slope(f_, z_o, clip)
    dc = seen(dc_new + dh_new * o * slope(h_, c_new, None), p_o, dz_o)
    dc = cut(dc, f * c + i * g, cell_clip)
    dz_i = dc * (g - c if coupled else g) * slope(f_, z_i, clip)
    dz_f = [dc * c * slope(f_, z_f[0], clip)] if z_f else []
    dz_g = dc * i * slope(g_, z_g, clip)
    dc_old = seen(dc * f, p_i, dz_i)
    dc_old = seen(dc_old, p_f[0], dz_f[0]) if z_f else dc_old
    dz = join(dz_i, *dz_f, dz_g, dz_o)
    dP = [] if P is None else [join(*(d * c for d in (dz_i, *dz_f)), dz_o * c_new).sum(axis=0)]
    return dz, dz, (dz @ R, dc_old), dz.T @ h, *dP


def gru_general_step(x, before, W, R, b_ih, b_hh, *, functions):
    """`gru_step` with activations f of r and z, and g of n; ONNX's linear_before_reset = 1."""
    h, seen, ((f, g), clip, _) = before[0], before[-1], functions
    x_r, x_z, x_n = split(x @ W.T + b_ih, 3)
    h_r, h_z, hn = split(seen @ R.T + b_hh, 3)
    z_r, z_z = x_r + h_r, x_z + h_z
    z_n = x_n + activate(f, z_r, clip) * hn
    z = activate(f, z_z, clip)
    h_new = (1 - z) * activate(g, z_n, clip) + z * h
    return (h_new,), (z_r, z_z, z_n, hn)


def gru_general_step_backward(d_after, gates, before, after, R, *, functions):
    (dh_new,), (z_r, z_z, z_n, hn), h, seen = d_after, gates, before[0], before[-1]
    (f, g), clip, _ = functions
    r, z, n = activate(f, z_r, clip), activate(f, z_z, clip), activate(g, z_n, clip)
    dz_n = dh_new * (1 - z) * slope(g, z_n, clip)
    dz_z = dh_new * (h - n) * slope(f, z_z, clip)
    dz_r = dz_n * hn * slope(f, z_r, clip)
    dz_x = join(dz_r, dz_z, dz_n)
    dz_h = join(dz_r, dz_z, dz_n * r)
    return dz_x, dz_h, apart(before, dh_new * z, dz_h @ R), dz_h.T @ seen


def gru_reset_before_general_step(x, before, W, R, b_ih, b_hh, *, functions):
    """`gru_reset_before_step` with activations f of r and z, and g of n; ONNX's default form."""
    h, seen, ((f, g), clip, _) = before[0], before[-1], functions
    H = h.shape[1]
    R_rz, R_n = R[: 2 * H], R[2 * H :]
    z_rz, z_n = np.split(x @ W.T + b_ih + b_hh, [2 * H], axis=1)
    z_r, z_z = split(z_rz + seen @ R_rz.T, 2)
    r, z = activate(f, z_r, clip), activate(f, z_z, clip)
    z_n = z_n + (r * seen) @ R_n.T
    h_new = (1 - z) * activate(g, z_n, clip) + z * h
    return (h_new,), (z_r, z_z, z_n)


def gru_reset_before_general_step_backward(d_after, gates, before, after, R, *, functions):
    (dh_new,), (z_r, z_z, z_n), h, seen = d_after, gates, before[0], before[-1]
    (f, g), clip, _ = functions
    H = h.shape[1]
    R_rz, R_n = R[: 2 * H], R[2 * H :]
    r, z, n = activate(f, z_r, clip), activate(f, z_z, clip), activate(g, z_n, clip)
    dz_n = dh_new * (1 - z) * slope(g, z_n, clip)
    dz_z = dh_new * (h - n) * slope(f, z_z, clip)
    drh = dz_n @ R_n
    dz_r = drh * seen * slope(f, z_r, clip)
    dz_rz = join(dz_r, dz_z)
    dz = join(dz_rz, dz_n)
    dh, d_seen = dh_new * z, drh * r + dz_rz @ R_rz
    dR = np.concatenate([dz_rz.T @ seen, dz_n.T @ (r * seen)])
    return dz, dz, apart(before, dh, d_seen), dR


PEEPHOLE = ("weight_peephole",)
NORM = "weight_norm_ih", "weight_norm_hh"
NORM_C = *NORM, "weight_norm_c", "bias_norm_c"


class Equations(NamedTuple):
    """A cell as its equations, and how many states and tape gates they speak of.

    `more` is what both take by name beside what all take; of a general cell, `functions` come to
    it.
    """

    step: Callable
    step_backward: Callable
    states: int
    tape_gates: int
    more: tuple = ()  # names of its weights of single units
    fixed: dict | None = None  # arguments of both by name
    general: bool = False


def _general_lstm(tape_gates, coupled, more=()):
    equations = lstm_general_step, lstm_general_step_backward
    return Equations(*equations, 2, tape_gates, more, {"coupled": coupled}, True)


EQUATIONS = {
    "rnn_tanh": Equations(rnn_tanh_step, rnn_tanh_step_backward, 1, 0),
    "rnn_relu": Equations(rnn_relu_step, rnn_relu_step_backward, 1, 0),
    "lstm": Equations(lstm_step, lstm_step_backward, 2, 4),
    "lstm_peephole": Equations(lstm_peephole_step, lstm_peephole_step_backward, 2, 4, PEEPHOLE),
    "lstm_coupled": Equations(lstm_coupled_step, lstm_coupled_step_backward, 2, 3),
    "lstm_coupled_peephole": Equations(
        lstm_coupled_peephole_step, lstm_coupled_peephole_step_backward, 2, 3, PEEPHOLE
    ),
    "gru": Equations(gru_step, gru_step_backward, 1, 4),
    "gru_reset_before": Equations(gru_reset_before_step, gru_reset_before_step_backward, 1, 3),
    "rnn_tanh_norm": Equations(rnn_tanh_norm_step, rnn_tanh_norm_step_backward, 1, 2, NORM),
    "rnn_relu_norm": Equations(rnn_relu_norm_step, rnn_relu_norm_step_backward, 1, 2, NORM),
    "lstm_norm": Equations(lstm_norm_step, lstm_norm_step_backward, 2, 8, NORM_C),
    "lstm_norm_cell": Equations(lstm_norm_cell_step, lstm_norm_cell_step_backward, 2, 8, NORM_C),
    "gru_norm": Equations(gru_norm_step, gru_norm_step_backward, 1, 6, NORM),
    "rnn_general": Equations(rnn_general_step, rnn_general_step_backward, 1, 1, general=True),
    "lstm_general": _general_lstm(4, False),
    "lstm_peephole_general": _general_lstm(4, False, PEEPHOLE),
    "lstm_coupled_general": _general_lstm(3, True),
    "lstm_coupled_peephole_general": _general_lstm(3, True, PEEPHOLE),
    "gru_general": Equations(gru_general_step, gru_general_step_backward, 1, 4, general=True),
    "gru_reset_before_general": Equations(
        gru_reset_before_general_step, gru_reset_before_general_step_backward, 1, 3, general=True
    ),
}


def equations(cell, functions=None):
    """A cell's step and its derivative, of a general one with its `Functions` in them."""
    e = EQUATIONS[cell]
    if e.general != (functions is not None):
        raise ValueError(f"{cell}: functions are what a general cell needs, and no other takes")
    given = {**(e.fixed or {}), "functions": functions} if e.general else {}
    step, step_backward = partial(e.step, **given), partial(e.step_backward, **given)
    return step, step_backward, e.states, e.tape_gates, e.more


# --------------------------------------------------------------------------------- through time


def walk(T, B, lengths=None, reverse=False, mask=None):
    """The steps of a run: a list of (s, t, rows) in processing order.

    mask [T, B]: instead of lengths, true at the steps of each row that there are.

    `rows` [n] are the rows of the batch that still run at processing step s, and t [n] is where
    each of them stands in its sequence: at s, or, reversed, s steps before its last valid one.
    Everything beyond a row's length is left out by choosing rows, never by multiplying with zero,
    so that not even a NaN gets out of the padding.

    >>> for s, t, rows in walk(3, 2, lengths=[3, 1], reverse=True):
    ...     print(s, t.tolist(), rows.tolist())
    0 [2, 0] [0, 1]
    1 [1] [0]
    2 [0] [0]
    """
    if mask is None:
        lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
        mask = np.arange(T)[:, None] < lengths
    valid = [np.flatnonzero(column)[:: -1 if reverse else 1] for column in mask.T]
    steps = []
    for s in range(T):
        rows = np.flatnonzero([s < len(times) for times in valid])
        t = np.array([valid[row][s] for row in rows], np.intp)
        steps.append((s, t, rows))
    return steps


class Between(NamedTuple):
    """What happens to the states between steps, beside the cell's equations.

    Arrays are [T, B, N] of h and [T, B, H] of c, by time. h, c: settings (where, value), the first
    made first: where true, the state after the step is the value, or if that is None the state
    before (zoneout: Krueger et al., arXiv 1606.01305; there the h of a step is made of the c that
    the cell made, whatever becomes of that). hold: before the settings, the state after a step is
    p times the one before plus 1 - p times what the cell made, p for h and for c (zoneout's
    expectation). keep: what R multiplies is h times keep (dropout of h on its way into R: Gal and
    Ghahramani, arXiv 1512.05287, where it is the same for all steps). clip, clip_norm, backward:
    the gradient by h of later steps, before that of y comes in, is clipped number by number, or to
    a norm over the numbers of a row (after Graves, arXiv 1308.0850, who clips further inside).
    """

    h: tuple = ()
    c: tuple = ()
    hold: tuple = (0, 0)
    keep: np.ndarray | None = None
    clip: float = 0
    clip_norm: float = 0

    def before(self, cell, states, t, rows):
        """The states before a step as it takes them."""
        if self.keep is None:
            return states
        seen = states[0] * self.keep[t, rows]
        return (states[0], seen) if cell.startswith("gru") else (seen, *states[1:])

    def after(self, before, made, t, rows):
        """The states after a step, of those before it and what the cell made."""
        states = []
        for i, (old, new) in enumerate(zip(before, made, strict=True)):
            if self.hold[i]:
                new = self.hold[i] * old + (1 - self.hold[i]) * new
            for where, value in (self.h, self.c)[i]:
                new = np.where(where[t, rows], old if value is None else value[t, rows], new)
            states.append(new)
        return tuple(states)

    def after_backward(self, d_after, t, rows, d_values):
        """d(states after) -> d(what the cell made), d(states before); and by each setting's values,
        into d_values.
        """
        d_made, d_before = [], []
        for i, new in enumerate(d_after):
            old = np.zeros_like(new)
            settings = zip((self.h, self.c)[i], d_values[i], strict=True)
            for (where, value), d in reversed(list(settings)):
                here = where[t, rows]
                if value is None:
                    old = old + np.where(here, new, 0)
                else:
                    d[t, rows] = np.where(here, new, 0)
                new = np.where(here, 0, new)
            d_made.append(new)
            d_before.append(old)
        return d_made, d_before

    def before_backward(self, cell, d_before, t, rows):
        """d(states before as the step takes them) -> d(states before)."""
        if self.keep is None:
            return d_before
        if cell.startswith("gru"):
            return (d_before[0] + d_before[1] * self.keep[t, rows],)
        return (d_before[0] * self.keep[t, rows], *d_before[1:])

    def clipped(self, dh):
        """h's gradient of later steps, clipped."""
        if self.clip:
            dh = np.clip(dh, -self.clip, self.clip)
        if self.clip_norm:
            norm = np.sqrt((dh * dh).sum(axis=1, keepdims=True))
            dh = np.where(
                norm > self.clip_norm, dh * self.clip_norm / np.maximum(norm, self.clip_norm), dh
            )
        return dh


def _zero_for_none(units, rows, H, dtype):
    """Biases [G*H] and weights of single units, zeros where there are none: of a last b_c, [H]."""
    sizes = rows, rows, *[H] * (len(units) - 2)
    return [np.zeros(n, dtype) if one is None else one for one, n in zip(units, sizes, strict=True)]


def forward(
    cell, x, state, weights, *, lengths=None, reverse=False, projection=None, mask=None,
    between=None, functions=None,
):  # fmt: skip
    """One layer in one direction through time.

    cell: a name in EQUATIONS; x [T, B, I]; state: the initial states, each [B, H] (h, and for the
    LSTM c), or None for zeros; weights: (W [G*H, I], R [G*H, H], b_ih [G*H], b_hh [G*H]), and those
    of single units, as its Equations name them; a bias may be None; lengths [B], each in 0..T, or
    None for T; reverse: from each row's last valid step to its first; projection [P, H]: what the
    cell makes is projected to h, so that h and y have P numbers, and R is [G*H, P] (Sak, Senior and
    Beaufays, arXiv 1402.1128; torch.nn.LSTM's weight_hr); mask bool [T, B]: instead of lengths, the
    steps that there are of each row; between: a `Between`; functions: the `Functions`
    of a general cell.

    Returns y [T, B, H], zeros past a row's length; the states after each row's last valid step,
    each [B, H] (its initial ones if its length is 0); and the tape, a dict of gates [T, B, Gt, H]
    (None if Gt = 0), h [T+1, B, H] and c (None if the cell has no c), in processing order, slot 0
    of h and c being the initial states. Tape slots past a length mean nothing and hold NaN.

    >>> W, R = np.array([[1.0]]), np.array([[2.0]])
    >>> y, (h_n,), tape = forward("rnn_relu", np.ones((3, 1, 1)), None, (W, R, None, None))
    >>> y[:, 0, 0].tolist(), h_n.tolist()
    ([1.0, 3.0, 7.0], [[7.0]])
    """
    step, _, n_states, n_gates, _ = equations(cell, functions)
    T, B, _ = x.shape
    W, R = weights[:2]
    H, N = R.shape[1] if projection is None else projection.shape[1], R.shape[1]
    between = between or Between()
    values = [value for _, value in (*between.h, *between.c)]
    given = [a for a in (x, *weights, *(state or ()), projection, *values) if a is not None]
    dtype = np.result_type(*given)
    units = _zero_for_none(weights[2:], len(R), H, dtype)

    y = np.zeros((T, B, N), dtype)
    gates = np.full((T, B, n_gates, H), np.nan, dtype)
    states = [np.full((T + 1, B, size), np.nan, dtype) for size in (N, H)[:n_states]]
    for i, sequence in enumerate(states):
        sequence[0] = 0 if state is None else state[i]

    for s, t, rows in walk(T, B, lengths, reverse, mask):
        before = tuple(sequence[s, rows] for sequence in states)
        seen = between.before(cell, before, t, rows)
        made, step_gates = step(x[t, rows], seen, W, R, *units)
        if projection is not None:
            made = made[0] @ projection.T, *made[1:]
        after = between.after(before, made, t, rows)
        for sequence, value in zip(states, after, strict=True):
            sequence[s + 1, rows] = value
        for i, gate in enumerate(step_gates):
            gates[s, rows, i] = gate
        y[t, rows] = after[0]

    last = np.full(B, T) if lengths is None else np.asarray(lengths)
    last = last if mask is None else mask.sum(axis=0)
    state_n = tuple(sequence[last, np.arange(B)] for sequence in states)
    h, c = states if n_states == 2 else (*states, None)
    return y, state_n, dict(gates=gates if n_gates else None, h=h, c=c)


def backward(
    cell, x, tape, weights, dy, dstate, *, lengths=None, reverse=False, projection=None, mask=None,
    between=None, dc_steps=None, functions=None,
):  # fmt: skip
    """Gradients of one layer in one direction: the chain rule along the walk, from its end.

    x, weights and the options but dc_steps: as in the forward call that made `tape`; dy [T, B, H]
    and dstate (each [B, H], by the states after the last valid step) are the gradients of the loss
    by forward's results, either may be None for zeros (Werbos, "Backpropagation through time",
    1990); so is dc_steps [T, B, H], by the c after each step.

    Returns a dict: x [T, B, I] (zeros past a row's length), state (a tuple of [B, H], by the
    initial states), weight_ih, weight_hh, bias_ih, bias_hh (None where the bias is), the cell's
    weights of single units, and weight_hr where it is. Where something happens between steps, also
    values, for h and c the gradients by each setting's values, and norms [T, B], of the gradient by
    h.

    >>> weights = np.array([[1.0]]), np.array([[2.0]]), None, None
    >>> x = np.ones((3, 1, 1))
    >>> _, _, tape = forward("rnn_relu", x, None, weights)
    >>> grads = backward("rnn_relu", x, tape, weights, None, (np.ones((1, 1)),))
    >>> grads["x"][:, 0, 0].tolist(), grads["weight_hh"].tolist()
    ([4.0, 2.0, 1.0], [[5.0]])
    """
    step, step_backward, n_states, n_gates, names = equations(cell, functions)
    T, B, _ = x.shape
    W, R, *units = weights
    names = "bias_ih", "bias_hh", *names
    absent = {name for name, one in zip(names, units, strict=True) if one is None}
    states = [tape["h"], tape["c"]][:n_states]
    dtype = states[0].dtype
    dx, dW, dR = np.zeros(x.shape, dtype), np.zeros(W.shape, dtype), np.zeros(R.shape, dtype)
    H = R.shape[1] if projection is None else projection.shape[1]
    units = _zero_for_none(units, len(R), H, dtype)
    d_units = [np.zeros(one.shape, dtype) for one in units]
    normalised = "weight_norm_ih" in names  # biases come after, and their gradients before it
    d_projection = None if projection is None else np.zeros(projection.shape, dtype)
    # By the states of each row at the step the walk has reached. A row joins in at its last step.
    d_states = [np.zeros(sequence.shape[1:], dtype) for sequence in states]
    for i, d_last in enumerate(dstate or ()):
        d_states[i][:] = d_last

    happens = between or Between()
    values = [[np.zeros(w.shape, dtype) for w, _ in s] for s in (happens.h, happens.c)]
    norms = np.zeros((T, B), dtype)
    for s, t, rows in reversed(walk(T, B, lengths, reverse, mask)):
        d_after = [d[rows] for d in d_states]
        d_after[0] = happens.clipped(d_after[0])
        if dy is not None:
            d_after[0] = d_after[0] + dy[t, rows]
        if dc_steps is not None:
            d_after[1] = d_after[1] + dc_steps[t, rows]
        norms[t, rows] = np.sqrt((d_after[0] * d_after[0]).sum(axis=1))
        d_after, d_past = happens.after_backward(d_after, t, rows, values)
        gates = tuple(tape["gates"][s, rows, i] for i in range(n_gates))
        before = tuple(sequence[s, rows] for sequence in states)
        before = happens.before(cell, before, t, rows)
        after = tuple(sequence[s + 1, rows] for sequence in states)
        if projection is not None or between:  # what the cell made, which the tape has not
            after, _ = step(x[t, rows], before, W, R, *units)
        if projection is not None:
            d_projection += d_after[0].T @ after[0]
            d_after[0] = d_after[0] @ projection
        more = units if normalised else units[2:]
        dz_x, dz_h, d_before, dR_s, *d_more = step_backward(d_after, gates, before, after, R, *more)
        d_before = happens.before_backward(cell, d_before, t, rows)
        for d, value, past in zip(d_states, d_before, d_past, strict=True):
            d[rows] = value + past
        dx[t, rows] = dz_x @ W
        dW += dz_x.T @ x[t, rows]
        dR += dR_s
        if not normalised:
            d_more = dz_x.sum(axis=0), dz_h.sum(axis=0), *d_more
        for total, part in zip(d_units, d_more, strict=True):
            total += part

    d_named = dict(zip(names, d_units, strict=True)) | dict.fromkeys(absent)
    if projection is not None:
        d_named["weight_hr"] = d_projection
    if between:
        d_named |= {"values": values, "norms": norms}
    return dict(
        x=dx,
        state=tuple(d_states),
        weight_ih=dW,
        weight_hh=dR,
        **d_named,
    )


# ------------------------------------------------------------------------ layers and directions


def stack_names(params):
    """The directions of each layer, by the ends of their parameters' names (PyTorch's).

    >>> stack_names({"weight_ih_l0": 0, "weight_ih_l0_reverse": 0})
    [['_l0', '_l0_reverse']]
    """
    directions = ["", "_reverse"] if "weight_ih_l0_reverse" in params else [""]
    layers = sum(name.startswith("weight_ih_l") for name in params) // len(directions)
    return [[f"_l{k}{d}" for d in directions] for k in range(layers)]


def stack_weights(cell, params, end):
    """(W, R, b_ih, b_hh) of the layer and direction whose names end so; None where absent.

    Those of single units follow, if there are such. Then the projection, or None.

    >>> stack_weights("lstm", {"weight_ih_l0": 1, "weight_hh_l0": 2}, "_l0")
    ((1, 2, None, None), None)
    """
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh", *EQUATIONS[cell].more
    weights = tuple(params.get(name + end) for name in names)
    return weights, params.get("weight_hr" + end)


def merge(kind, ys):
    """One y [T, B, Y] of a layer's directions' [T, B, H]: side by side, or number by number.

    "concat", Y = D*H, or "sum", "mean" (Keras's "ave") and "mul", Y = H. Keras's Bidirectional.

    >>> ys = [np.array([1.0]), np.array([4.0])]
    >>> [merge(kind, ys).tolist() for kind in ("sum", "mean", "mul")]
    [[5.0], [2.5], [4.0]]
    """
    if kind == "concat":
        return np.concatenate(ys, axis=2)
    ahead, back = ys
    return {"sum": ahead + back, "mean": (ahead + back) / 2, "mul": ahead * back}[kind]


def merge_backward(kind, dy, ys):
    """The gradients by the directions' ys from that by the merged one."""
    if kind == "concat":
        return np.split(dy, len(ys), axis=2)
    ahead, back = ys
    return {"sum": [dy, dy], "mean": [dy / 2, dy / 2], "mul": [dy * back, dy * ahead]}[kind]


def stack_forward(
    cell, x, state, params, *, lengths=None, masks=None, mask=None, between=None, merging="concat",
    functions=None,
):  # fmt: skip
    """Layers of one or two directions; a layer's y, its directions merged, is the next x.

    x [T, B, I]; state: the initial states, each [L*D, B, H] (layer by layer, forward direction
    first), or None for zeros; params: name -> array, named as in torch.nn; masks: for dropout, one
    [T, B, Y] array for each layer but the last, with which its y is multiplied, or None; mask and
    between as in `forward`, the same for all layers and directions; merging: how directions become
    one y, see `merge`.

    Returns y [T, B, Y] of the last layer; the last states, each [L*D, B, H]; and `tapes`, for
    each layer its x, a list of its directions' tapes, and one of their ys.

    >>> one = {"weight_ih_l0": np.eye(1), "weight_hh_l0": np.eye(1)}
    >>> two = one | {"weight_ih_l1": np.eye(1), "weight_hh_l1": np.eye(1)}
    >>> y, _, _ = stack_forward("rnn_relu", np.ones((3, 1, 1)), None, two)
    >>> y[:, 0, 0].tolist()
    [1.0, 3.0, 6.0]
    """
    states, tapes = [], []
    for k, ends in enumerate(stack_names(params)):
        if k > 0 and masks is not None:
            x = x * masks[k - 1]
        runs = []
        for d, end in enumerate(ends):
            first = None if state is None else tuple(s[k * len(ends) + d] for s in state)
            weights, projection = stack_weights(cell, params, end)
            how = dict(lengths=lengths, reverse=d == 1, projection=projection)
            how |= dict(mask=mask, between=between, functions=functions)
            runs.append(forward(cell, x, first, weights, **how))
        ys = [y for y, _, _ in runs]
        tapes.append((x, [tape for _, _, tape in runs], ys))
        states += [state_n for _, state_n, _ in runs]
        x = merge(merging, ys)
    return x, tuple(np.stack(s) for s in zip(*states, strict=True)), tapes


def stack_backward(
    cell, tapes, params, dy, dstate, *, lengths=None, masks=None, mask=None, between=None,
    merging="concat", functions=None,
):  # fmt: skip
    """Gradients of `stack_forward`, from its `tapes` and the gradients by its y and last states.

    dy [T, B, Y] or None, dstate: each [L*D, B, H], or None. Returns a dict: x [T, B, I], state
    (a tuple of [L*D, B, H]) and one entry for each parameter, by its name.

    >>> params = {"weight_ih_l0": np.eye(1), "weight_hh_l0": np.eye(1)}
    >>> _, _, tapes = stack_forward("rnn_relu", np.ones((3, 1, 1)), None, params)
    >>> grads = stack_backward("rnn_relu", tapes, params, np.ones((3, 1, 1)), None)
    >>> grads["x"][:, 0, 0].tolist()
    [3.0, 2.0, 1.0]
    """
    names = stack_names(params)
    grads, d_first = {}, {}
    for k, ends in reversed(list(enumerate(names))):
        x, layer_tapes, ys = tapes[k]
        dys = [None] * len(ends) if dy is None else merge_backward(merging, dy, ys)
        dy = 0
        for d, end in enumerate(ends):
            which = k * len(ends) + d
            d_last = None if dstate is None else tuple(s[which] for s in dstate)
            weights, projection = stack_weights(cell, params, end)
            how = dict(lengths=lengths, reverse=d == 1, projection=projection)
            how |= dict(mask=mask, between=between, functions=functions)
            run = backward(cell, x, layer_tapes[d], weights, dys[d], d_last, **how)
            dy = dy + run.pop("x")
            d_first[which] = run.pop("state")
            own = {name: grad for name, grad in run.items() if name not in ("values", "norms")}
            grads |= {name + end: grad for name, grad in own.items() if grad is not None}
        if k > 0 and masks is not None:
            dy = dy * masks[k - 1]
    states = zip(*(d_first[which] for which in range(len(d_first))), strict=True)
    return dict(x=dy, state=tuple(np.stack(s) for s in states), **grads)


# -------------------------------------------------------------------------------------- dropout


def mix(z):
    """A bijection of 64-bit numbers whose results look random: one step of splitmix64.

    z: uint64 array of at least one dimension (so that NumPy wraps around in silence).
    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.

    >>> [hex(v) for v in mix(np.array([0], np.uint64))]
    ['0xe220a8397b1dcdaf']
    """
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def dropout_mask(seed, call, layer, T, B, N, p):
    """Which of [T, B, N] numbers dropout keeps, each with probability 1 - p.

    The random number of an element is a function of (seed, call, layer, t, b, unit) alone: it does
    not matter who computes it, nor in which order. Returns bool [T, B, N].

    >>> dropout_mask(0, 0, 0, 1, 2, 4, 0.5).shape
    (1, 2, 4)
    """
    key = np.zeros(1, np.uint64)
    for number in (seed, call, layer):
        key = mix(key + np.uint64(number))
    t = np.arange(T, dtype=np.uint64).reshape(T, 1, 1)
    b = np.arange(B, dtype=np.uint64).reshape(1, B, 1)
    unit = np.arange(N, dtype=np.uint64).reshape(1, 1, N)
    row = mix(key + ((t << np.uint64(32)) | b))
    element = mix(row + unit)
    return (element >> np.uint64(11)) * 2.0**-53 >= p  # 53 bits: a uniform number in [0, 1)


# ---------------------------------------------------------------------------------- closed loop


def uniform(seed, t, b):
    """The number in [0, 1), of 53 bits, that decides what row b draws at step t.

    >>> 0 <= uniform(1, 0, 0) < 1
    True
    """
    key = mix(np.array([seed], np.uint64))
    row = mix(key + (np.array([t], np.uint64) << np.uint64(32) | np.uint64(b)))
    return float((mix(row) >> np.uint64(11))[0] * 2.0**-53)


def draw(logits, temperature, u):
    """The token that u in [0, 1) draws from softmax(logits / temperature), by the inverse of its
    distribution function: the first up to which the probabilities sum up to more than u.

    >>> [draw(np.log([0.25, 0.5, 0.25]), 1.0, u) for u in (0.0, 0.2, 0.3, 0.7, 0.8)]
    [0, 0, 1, 1, 2]
    """
    terms = np.exp((logits - logits.max()) / temperature)
    sums = np.cumsum(terms)
    return int(np.searchsorted(sums, u * sums[-1], side="right"))


def closed_loop(
    cell, first, steps, state, params, head, *, choice="value", table=None, covariates=None,
    teacher=None, temperature=1.0, seed=0, step0=0, row0=0,
    functions=None,
):  # fmt: skip
    """A stack of one direction whose input at each step is made of its own output before.

    o_t = weight h_t + bias, head = (weight [O, N], bias [O] or None), h_t the last layer's. With
    choice "value" x_t is o_{t-1}, then the covariates [T, B, K] of step t, if there are any; o_{-1}
    is first [B, O]. teacher: (inputs [T, B, O], mask [T, B]), x_t where the mask is true, instead
    of o_{t-1}. With "argmax" and "sample" x_t is the row of table [O, I] (None: the identity) of
    the token that o_{t-1} chooses; first is B tokens. See `draw`, `uniform`.

    Returns o [T, B, O], tokens [T, B] or None, the last states, and each step's `tapes`.

    >>> doubling = {"weight_ih_l0": 2 * np.eye(1), "weight_hh_l0": np.zeros((1, 1))}
    >>> one = np.ones((1, 1))
    >>> o, *_ = closed_loop("rnn_relu", one, 3, None, doubling, (one, None))
    >>> o[:, 0, 0].tolist()
    [2.0, 4.0, 8.0]
    """
    weight, bias = head
    if choice == "value":
        before = first
    elif table is None:
        table = np.eye(len(weight))
    outputs, tokens, tapes = [], [], []
    token = first
    for t in range(steps):
        if choice == "value":
            x = before
            if teacher is not None:
                inputs, mask = teacher
                x = np.where(mask[t][:, None], inputs[t], x)
            if covariates is not None:
                x = np.concatenate([x, covariates[t]], axis=1)
        else:
            x = table[token]
        y, state, tape = stack_forward(cell, x[None], state, params, functions=functions)
        before = y[0] @ weight.T + (0 if bias is None else bias)
        if choice == "argmax":
            token = before.argmax(axis=1)
        elif choice == "sample":
            rows = enumerate(before, row0)
            token = [draw(o, temperature, uniform(seed, step0 + t, b)) for b, o in rows]
        outputs.append(before)
        tokens.append(token)
        tapes.append((y[0], tape))
    chosen = None if choice == "value" else np.array(tokens, np.intp).reshape(steps, len(first))
    return np.array(outputs).reshape(steps, len(first), len(weight)), chosen, state, tapes


def closed_loop_backward(
    cell, tapes, params, head, d_outputs, dstate, *, teacher=None, functions=None
):
    """Gradients of a `closed_loop` with choice "value", from its `tapes`.

    d_outputs [T, B, O]: by each o as a result. Each is also the next step's input, where no teacher
    gave that: d o_t = d_outputs_t + (dx_{t+1}'s first O numbers). Returns a dict as of
    `stack_backward`, x [T, B, I], first [B, O], and weight and bias of the head.
    """
    weight, _ = head
    O = len(weight)
    total = dict(weight=np.zeros_like(weight), bias=np.zeros(O, weight.dtype))
    dxs, carried = [], np.zeros(d_outputs.shape[1:], weight.dtype)
    for t in reversed(range(len(tapes))):
        h, tape = tapes[t]
        d_o = d_outputs[t] + carried
        total["weight"] = total["weight"] + d_o.T @ h
        total["bias"] = total["bias"] + d_o.sum(axis=0)
        dy = (d_o @ weight)[None]
        grads = stack_backward(cell, tape, params, dy, dstate, functions=functions)
        dstate = grads.pop("state")
        (dx,) = grads.pop("x")
        carried = dx[:, :O]
        if teacher is not None:
            carried = np.where(teacher[1][t][:, None], 0, carried)
        dxs.append(dx)
        for name, grad in grads.items():
            total[name] = total.get(name, 0) + grad
    return dict(total, x=np.array(dxs[::-1]), first=carried, state=dstate)
