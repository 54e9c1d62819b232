"""TensorFlow: Keras's recurrent layers under `tf.function(jit_compile=True)`.

Knows Keras's order of gates and its transposed weights; layers and directions are put together
here, because its own wrapper for two directions takes no initial states in one piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..shapes import Problem, Shape
from . import Library, Prepared, ends, keep_cores, named, reordered

# Class, where its gates are among ours, arguments.
LAYERS = {
    "rnn_tanh": ("SimpleRNN", (0,), {"activation": "tanh"}),
    "rnn_relu": ("SimpleRNN", (0,), {"activation": "relu"}),
    "lstm": ("LSTM", (0, 1, 2, 3), {}),
    "gru": ("GRU", (1, 0, 2), {"reset_after": True}),
    "gru_reset_before": ("GRU", (1, 0, 2), {"reset_after": False}),
}


class TensorFlow(Library):
    """One XLA-compiled function of tensors, time in the middle as Keras wants it."""

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        flags = {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        return {"KERAS_BACKEND": "tensorflow", **quiet, **(flags if isa else {})}

    def __init__(self, threads: int) -> None:
        keep_cores(threads)
        import keras
        import tensorflow

        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)
        self.library, self.keras = tensorflow, keras
        self.about = {"tensorflow": tensorflow.__version__, "keras": keras.__version__}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        tf = self.library
        layers = [[self._layer(shape, given, end) for end in suffixes] for suffixes in ends(shape)]
        x, dy = tf.constant(given.x.swapaxes(0, 1)), tf.constant(given.dy.swapaxes(0, 1))
        state = tuple(map(tf.constant, given.state))
        valid = None
        if given.lengths is not None:
            valid = tf.constant(np.arange(shape.T) < given.lengths[:, None])

        def forward(x: Any, state: tuple) -> tuple:
            last = []
            for directions in layers:
                ys = []
                for layer in directions:
                    first = [s[len(last)] for s in state]
                    y, *state_n = layer(x, initial_state=first, mask=valid)
                    y = tf.reverse(y, [1]) if layer.go_backwards else y
                    ys.append(y if valid is None else tf.where(valid[..., None], y, 0))
                    last.append(state_n)
                x = tf.concat(ys, axis=-1)
            return x, tuple(map(tf.stack, zip(*last, strict=True)))

        def steps_first(y: Any) -> np.ndarray:
            return y.numpy().swapaxes(0, 1)

        if mode == "training":
            variables = [v for directions in layers for layer in directions for v in layer.weights]
            variables = [v.value for v in variables]

            @tf.function(jit_compile=True)
            def train(x: Any, state: tuple, dy: Any) -> tuple:
                with tf.GradientTape() as tape:
                    tape.watch((x, state))
                    y, state_n = forward(x, state)
                return y, state_n, tape.gradient(y, (x, state, variables), dy)

            def gradients(value: tuple) -> dict:
                y, state_n, (dx, dstate, grads) = value
                grads = _ours(shape, [np.asarray(grad) for grad in grads])
                return named(steps_first(y), state_n, steps_first(dx), dstate, grads)

            return lambda: train(x, state, dy), gradients

        infer = tf.function(forward, jit_compile=True)
        if mode == "inference":
            return lambda: infer(x, state), lambda value: named(steps_first(value[0]), value[1])

        steps = [x[:, t : t + 1] for t in range(shape.T)]

        def stream() -> list:
            nonlocal state
            ys = []
            for x_t in steps:
                y, state = infer(x_t, state)
                ys.append(y)
            return ys

        return stream, lambda ys: named(steps_first(tf.concat(ys, axis=1)), state)

    def _layer(self, shape: Shape, given: Problem, end: str) -> Any:
        if shape.cell not in LAYERS or shape.projection:
            raise NotImplementedError(f"no {shape.cell}{', projected' * (shape.projection > 0)}")
        kind, order, arguments = LAYERS[shape.cell]
        layer = getattr(self.keras.layers, kind)(
            shape.H, return_sequences=True, return_state=True, dtype=shape.dtype,
            go_backwards=end.endswith("_reverse"), **arguments,
        )  # fmt: skip
        W, R, b_ih, b_hh = (
            reordered(given.weights[name + end], order, len(order))
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        layer.build((shape.B, shape.T, W.shape[1]))
        bias = np.stack([b_ih, b_hh]) if shape.cell == "gru" else b_ih + b_hh
        layer.set_weights([W.T, R.T, bias])
        return layer


def _ours(shape: Shape, grads: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients by Keras's weights -> by ours; where Keras has one bias, both of ours get it."""
    order = LAYERS[shape.cell][1]
    back = np.argsort(order)
    found, given = {}, iter(grads)
    for end in (end for suffixes in ends(shape) for end in suffixes):
        dW, dR, db = next(given), next(given), next(given)
        db_ih, db_hh = db if db.ndim == 2 else (db, db)
        for name, grad in (
            ("weight_ih", dW.T), ("weight_hh", dR.T), ("bias_ih", db_ih), ("bias_hh", db_hh),
        ):  # fmt: skip
            found[name + end] = reordered(grad, back, len(order))
    return found
