"""A layer as an ONNX model, for the runtimes that take such.

Knows ONNX's operators and their order of gates, and the `onnx` package.
"""

from __future__ import annotations

import numpy as np

from ...cells import CELLS
from ..shapes import Problem, Shape
from . import ends, reordered

# Operator, where its gates are among ours (None: it has one that we have not), attributes.
OPERATORS = {
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "lstm_peephole": ("LSTM", (0, 3, 1, 2), {}),
    "lstm_coupled": ("LSTM", (0, 2, None, 1), {"input_forget": 1}),
    "lstm_coupled_peephole": ("LSTM", (0, 2, None, 1), {"input_forget": 1}),
}
PEEPHOLES = {"lstm_peephole": (0, 2, 1), "lstm_coupled_peephole": (0, 1, None)}  # theirs are i o f
OPSET, IR = 14, 8  # old enough for every runtime that is still in use
STATES = ("h", "c")


def inputs(given: Problem) -> dict[str, np.ndarray]:
    """What the model of a problem is given, by name."""
    found = {"x": given.x, **{f"{s}_0": a for s, a in zip(STATES, given.state, strict=False)}}
    if given.lengths is not None:
        found["lengths"] = given.lengths.astype(np.int32)
    return found


def model(shape: Shape, given: Problem, mode: str) -> bytes:
    """A model of all steps, or of one for a stream, from x, h_0, c_0 and lengths to y, h_n and c_n.

    Weights are initialisers: a runtime may re-lay them when it loads the model. Raises
    NotImplementedError for what the runtimes do not do.
    """
    import onnx
    from onnx import helper, numpy_helper

    if mode == "training":
        raise NotImplementedError("no gradients")
    if shape.projection:
        raise NotImplementedError("no projection")
    if CELLS[shape.cell].norms:
        raise NotImplementedError("no layer normalisation")
    if shape.dtype != "float32":
        raise NotImplementedError(f"no recurrent layers in {shape.dtype}")
    steps = 1 if mode == "stream" else shape.T

    operator, order, attributes = OPERATORS[shape.cell]
    L, D, B, H = shape.layers, shape.directions, shape.B, shape.H
    states = STATES[: len(given.state)]
    number = helper.np_dtype_to_tensor_dtype(np.dtype(shape.dtype))
    nodes, constants = [], []

    def node(kind: str, inputs: list[str], outputs: list[str], **attributes: object) -> None:
        nodes.append(helper.make_node(kind, inputs, outputs, **attributes))

    def constant(name: str, array: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    cell = CELLS[shape.cell]

    def weights(kind: str, suffixes: list[str]) -> np.ndarray:
        gates, by = len(cell.gates), order
        if kind == "weight_peephole":
            gates, by = len(cell.peepholes), PEEPHOLES[shape.cell]
        return np.stack([reordered(given.weights[kind + end], by, gates) for end in suffixes])

    x = "x"
    for layer, suffixes in enumerate(ends(shape)):
        biases = [weights("bias_ih", suffixes), weights("bias_hh", suffixes)]
        peepholes = []
        if cell.peepholes:
            peepholes.append(constant(f"P{layer}", weights("weight_peephole", suffixes)))
        first = {s: f"{s}_0" if L == 1 else f"{s}_0_{layer}" for s in states}
        last = {s: f"{s}_n" if L == 1 else f"{s}_n_{layer}" for s in states}
        node(
            operator,
            [
                x,
                constant(f"W{layer}", weights("weight_ih", suffixes)),
                constant(f"R{layer}", weights("weight_hh", suffixes)),
                constant(f"B{layer}", np.concatenate(biases, axis=1)),
                "lengths" if shape.uneven else "",
                *first.values(),
                *peepholes,
            ],
            [f"Y{layer}", *last.values()],
            hidden_size=H,
            direction="bidirectional" if D == 2 else "forward",
            **{n: v * D if isinstance(v, list) else v for n, v in attributes.items()},
        )
        x = "y" if layer == L - 1 else f"y{layer}"
        if D == 1:  # Y is [T, D, B, H]
            node("Squeeze", [f"Y{layer}", constant(f"axis{layer}", np.array([1]))], [x])
        else:
            node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3])
            sizes = constant(f"sizes{layer}", np.array([steps, B, D * H]))
            node("Reshape", [f"Z{layer}", sizes], [x])
    if L > 1:
        for s in states:
            split = constant(f"split_{s}", np.full(L, D))
            node("Split", [f"{s}_0", split], [f"{s}_0_{k}" for k in range(L)], axis=0)
            nodes.insert(0, nodes.pop())
            node("Concat", [f"{s}_n_{k}" for k in range(L)], [f"{s}_n"], axis=0)

    def value(name: str, *sizes: int, kind: int = number) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, sizes)

    given_values = [value("x", steps, B, shape.I), *(value(f"{s}_0", L * D, B, H) for s in states)]
    if shape.uneven:
        given_values.append(value("lengths", B, kind=onnx.TensorProto.INT32))
    wanted = [value("y", steps, B, D * H), *(value(f"{s}_n", L * D, B, H) for s in states)]
    graph = helper.make_graph(nodes, "layer", given_values, wanted, constants)
    opset = helper.make_opsetid("", OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=IR)
    onnx.checker.check_model(made)
    return made.SerializeToString()
