"""JAX: `lax.scan` over the equations, jitted; gradients by `jax.vjp`.

Knows JAX, and the equations, because JAX has no recurrent layers. What does not depend on the
state is computed ahead for all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rnnfast.cells import CELLS

from ..shapes import Problem, Shape
from . import Library, Prepared, ends, keep_cores, named


class Jax(Library):
    """One jitted function of x, states and weights."""

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        flags = {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        return {"JAX_PLATFORMS": "cpu", **(flags if isa else {})}

    def __init__(self, threads: int) -> None:
        keep_cores(threads)
        import jax

        jax.config.update("jax_enable_x64", True)  # for float64; float32 stays what it is
        self.library = jax
        self.about = {"jax": jax.__version__}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        jax = self.library
        put = jax.device_put
        x, state, dy = put(given.x), put(given.state), put(given.dy)
        weights = {name: put(array) for name, array in given.weights.items()}
        valid = None
        if given.lengths is not None:
            steps = jax.numpy.arange(shape.T)[:, None, None]
            valid = steps < put(given.lengths)[:, None]
        layers = self._layers(shape, valid)

        if mode == "training":

            @jax.jit
            def train(x: Any, state: tuple, weights: dict, dy: Any) -> tuple:
                (y, state_n), pull = jax.vjp(layers, x, state, weights)
                none = tuple(jax.numpy.zeros_like(s) for s in state_n)
                return y, state_n, pull((dy, none))

            def gradients(value: tuple) -> dict:
                y, state_n, (dx, dstate, grads) = value
                return named(y, state_n, dx, dstate, grads)

            return lambda: jax.block_until_ready(train(x, state, weights, dy)), gradients

        infer = jax.jit(layers)
        if mode == "inference":
            call = lambda: jax.block_until_ready(infer(x, state, weights))  # noqa: E731
            return call, lambda value: named(*value)

        steps = [put(x_t[None]) for x_t in given.x]

        def stream() -> list:
            nonlocal state
            ys = []
            for x_t in steps:
                y, state = infer(x_t, state, weights)
                ys.append(y.block_until_ready())
            return ys

        return stream, lambda ys: named(jax.numpy.concatenate(ys), state)

    def _layers(self, shape: Shape, valid: Any) -> Callable:
        """The function of a shape; valid [T, B, 1]: which steps are within their row's length."""
        if shape.projection:
            raise NotImplementedError("no projection is written here")
        if CELLS[shape.cell].norms:
            raise NotImplementedError("no layer normalisation is written here")
        jax, ahead, step = self.library, *_equations(self.library, shape.cell)
        jnp = jax.numpy

        def direction(x: Any, state: tuple, weights: tuple, reverse: bool) -> tuple:
            W, R, b_ih, b_hh, *P = weights
            R_T = R.T

            def masked(state: tuple, given: tuple) -> tuple:
                z, here = given
                after = step(z, state, R_T, b_hh, *P)
                after = tuple(
                    jnp.where(here, new, old) for new, old in zip(after, state, strict=True)
                )
                return after, after[0]

            def plain(state: tuple, z: Any) -> tuple:
                after = step(z, state, R_T, b_hh, *P)
                return after, after[0]

            z = ahead(x, W, b_ih, b_hh)
            if valid is None:
                state_n, y = jax.lax.scan(plain, state, z, reverse=reverse)
                return y, state_n
            state_n, y = jax.lax.scan(masked, state, (z, valid), reverse=reverse)
            return jnp.where(valid, y, 0), state_n

        def layers(x: Any, state: tuple, weights: dict) -> tuple:
            last = []
            for suffixes in ends(shape):
                ys = []
                for d, end in enumerate(suffixes):
                    own = tuple(weights[name + end] for name in CELLS[shape.cell].parameters())
                    first = tuple(s[len(last)] for s in state)
                    y, state_n = direction(x, first, own, d == 1)
                    ys.append(y)
                    last.append(state_n)
                x = ys[0] if len(ys) == 1 else jnp.concatenate(ys, axis=-1)
            return x, tuple(jnp.stack(s) for s in zip(*last, strict=True))

        return layers


def _equations(jax: Any, cell: str) -> tuple[Callable, Callable]:
    """What is computed ahead, of x; and one step, of that and the state.

    ahead(x [T, B, I], W, b_ih, b_hh) -> z [T, B, G*H]; step(z [B, G*H], state, R^T, b_hh) -> state,
    of a cell with peepholes step(z, state, R^T, b_hh, P).
    """
    jnp, sigmoid, tanh = jax.numpy, jax.nn.sigmoid, jax.numpy.tanh

    def both_biases(x: Any, W: Any, b_ih: Any, b_hh: Any) -> Any:
        return x @ W.T + (b_ih + b_hh)

    def one_bias(x: Any, W: Any, b_ih: Any, b_hh: Any) -> Any:
        return x @ W.T + b_ih

    def rnn_tanh(z: Any, state: tuple, R_T: Any, b_hh: Any) -> tuple:
        return (tanh(z + state[0] @ R_T),)

    def rnn_relu(z: Any, state: tuple, R_T: Any, b_hh: Any) -> tuple:
        return (jax.nn.relu(z + state[0] @ R_T),)

    def lstm(z: Any, state: tuple, R_T: Any, b_hh: Any, P: Any = None) -> tuple:
        (h, c), row = state, CELLS[cell]
        gates = dict(zip(row.gates, jnp.split(z + h @ R_T, len(row.gates), axis=-1), strict=True))
        if row.peepholes:
            p = dict(zip(row.peepholes, jnp.split(P, len(row.peepholes)), strict=True))
            gates |= {gate: gates[gate] + p[gate] * c for gate in p if gate != "o"}
        i = sigmoid(gates["i"])
        c = (sigmoid(gates["f"]) if "f" in gates else 1 - i) * c + i * tanh(gates["g"])
        o = gates["o"] + p["o"] * c if row.peepholes else gates["o"]
        return sigmoid(o) * tanh(c), c

    def gru(z: Any, state: tuple, R_T: Any, b_hh: Any) -> tuple:
        (h,) = state
        x_r, x_z, x_n = jnp.split(z, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(h @ R_T + b_hh, 3, axis=-1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        return ((1 - z) * tanh(x_n + r * h_n) + z * h,)

    def gru_reset_before(z: Any, state: tuple, R_T: Any, b_hh: Any) -> tuple:
        (h,) = state
        H = h.shape[-1]
        x_r, x_z, x_n = jnp.split(z, 3, axis=-1)
        h_r, h_z = jnp.split(h @ R_T[:, : 2 * H], 2, axis=-1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        return ((1 - z) * tanh(x_n + (r * h) @ R_T[:, 2 * H :]) + z * h,)

    steps = {step.__name__: step for step in (rnn_tanh, rnn_relu, gru, gru_reset_before)}
    step = lstm if CELLS[cell].kind == "LSTM" else steps[cell]
    return one_bias if cell == "gru" else both_biases, step
