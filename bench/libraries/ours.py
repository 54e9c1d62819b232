"""This library as its users call it.

Knows the public API, and which options a cell of the table stands for.
"""

from __future__ import annotations

import numpy as np

from ...cells import CELLS
from ..happenings import happening
from ..shapes import Problem, Shape
from . import Library, Prepared, named


class Ours(Library):
    """At its best: gradients replaced, not added to, as PyTorch's are where there are none.

    Frozen for inference, as ONNX Runtime and OpenVINO have their weights re-laid beforehand. For
    training it is not: there the weights change between two calls.
    """

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        return {"RNNFAST_ISA": isa} if isa else {}

    def __init__(self, threads: int) -> None:
        import rnnfast

        rnnfast.set_num_threads(threads)
        self.library = rnnfast
        self.about = {"rnnfast": rnnfast.__version__, "isa": rnnfast.isa()}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        cell = CELLS[shape.cell]
        projection = {"proj_size": shape.projection} if shape.projection else {}
        happens = happening(shape)
        module = getattr(self.library, cell.kind)(
            shape.I, shape.H, num_layers=shape.layers, bidirectional=shape.directions == 2,
            dtype=shape.dtype, **cell.options, **projection, **happens.module,
        )  # fmt: skip
        module.load_state_dict(given.weights)
        x, dy, lengths = given.x, given.dy, given.lengths
        pair = len(given.state) == 2
        state = given.state if pair else given.state[0]

        def tuple_of(state: tuple | np.ndarray) -> tuple:
            return state if pair else (state,)

        if mode == "training":

            def train() -> tuple:
                module.dropout_calls = 0  # the same masks each time
                y, state_n, tape, *_ = module.forward_train(x, state, lengths, **happens.call)
                dx, dstate, *_ = module.backward(tape, dy, accumulate=False, **happens.backward)
                return y, state_n, dx, dstate

            def gradients(value: tuple) -> dict:
                y, state_n, dx, dstate = value
                return named(y, tuple_of(state_n), dx, tuple_of(dstate), module.grads)

            return train, gradients

        module.freeze()
        if mode == "stream":
            stream = module.stream(shape.B)
            stream.state = state
            step, steps = stream.step, list(x)
            return (
                lambda: [step(x_t) for x_t in steps],
                lambda ys: named(np.stack(ys), tuple_of(stream.state)),
            )
        if happens.backward:
            raise NotImplementedError("inference has no gradients")
        return lambda: module(x, state, lengths, **happens.call), lambda value: named(
            value[0], tuple_of(value[1])
        )
