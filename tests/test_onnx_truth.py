"""Layers against ONNX's operators RNN, LSTM and GRU: activations, clip, peepholes, CIFG, both GRUs.

Knows the public functions, ONNX Runtime, and onnx's own reference for what that has (it takes
activations and clip, and does as if there were none). ONNX's text says that clip is applied to the
input of activations; as in ONNX Runtime, these are the gates' alone, and not h's of c. Weights are
unequal in all gates and both directions.
"""

import numpy as np
import pytest
from cases import TURNS, draw_functions, make_weights, past_lengths
from tolerances import assert_close

from rnnfast import functional
from rnnfast.cells import ACTIVATIONS, CELLS, PLAIN, Functions

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402

T, B, I, H = 6, 4, 3, 5
LENGTHS = np.array([6, 1, 4, 6])
NAMES = {
    "leakyrelu": "LeakyRelu",
    "thresholdedrelu": "ThresholdedRelu",
    "scaledtanh": "ScaledTanh",
    "hardsigmoid": "HardSigmoid",
}
# Where their gates are among ours, of a coupled LSTM any in the place of f; and their peepholes.
GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
COUPLED = (0, 2, 0, 1)
PEEPHOLES = {3: (0, 2, 1), 2: (0, 1, 0)}
DIRECTIONS = "forward", "reverse", "bidirectional"


def reordered(array, order, gates):
    parts = np.split(array, gates)
    return np.concatenate([parts[k] for k in order])


def model(cell, direction, uneven, functions, weights, given):
    """A model of one operator, and its weights inside."""
    row, D = CELLS[cell], len(weights)
    coupled = row.options.get("coupled", False)
    order = COUPLED if coupled else GATES[row.kind]
    gates = len(row.gates)
    W, R, b_ih, b_hh, *P = (np.stack(arrays) for arrays in zip(*weights, strict=True))
    constants = {
        "W": [reordered(w, order, gates) for w in W],
        "R": [reordered(r, order, gates) for r in R],
        "B": [
            np.concatenate([reordered(b, order, gates) for b in pair])
            for pair in zip(b_ih, b_hh, strict=True)
        ],
    }
    if P:
        n = len(row.peepholes)
        constants["P"] = [reordered(p, PEEPHOLES[n], n) for p in P[0]]
    own = [(a,) if isinstance(a, str) else a for a in functions.activations] * len(weights)
    attributes = {
        "direction": direction,
        "hidden_size": H,
        "activations": [NAMES.get(name, name.capitalize()) for name, *_ in own],
    }
    alphas, betas = [a[1] for a in own if len(a) > 1], [a[2] for a in own if len(a) > 2]
    attributes |= {"activation_alpha": alphas} if alphas else {}
    attributes |= {"activation_beta": betas} if betas else {}
    attributes |= {"clip": functions.clip} if functions.clip else {}
    attributes |= {"input_forget": 1} if coupled else {}
    if row.kind == "GRU":
        attributes["linear_before_reset"] = int(row.options["reset_after"])
    inputs = ["x", "W", "R", "B", "lengths" if uneven else "", *(n for n in given if n[1:] == "_0")]
    outputs = ["Y", *(f"{name}_n" for name in row.states)]
    node = helper.make_node(row.kind, [*inputs, "P"] if P else inputs, outputs, **attributes)

    def value(name, array):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, array.shape)

    float_ = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "layer",
        [value(name, array) for name, array in given.items()],
        [
            helper.make_tensor_value_info(name, float_, [T, D, B, H] if name == "Y" else [D, B, H])
            for name in outputs
        ],
        [
            onnx.numpy_helper.from_array(np.stack(arrays).astype(np.float32), name)
            for name, arrays in constants.items()
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def compare(cell, direction, uneven, functions, run, turn=0):
    """A layer in float64, of weights of float32, against what `run` makes of the model."""
    rng = np.random.default_rng(turn)
    row, D = CELLS[cell], 2 if direction == "bidirectional" else 1
    weights = [tuple(np.float32(a) for a in make_weights(cell, I, H, rng)) for _ in range(D)]
    x = rng.standard_normal((T, B, I)).astype(np.float32)
    state = {f"{n}_0": rng.standard_normal((D, B, H)).astype(np.float32) for n in row.states}
    given = {"x": x, **state} | ({"lengths": LENGTHS.astype(np.int32)} if uneven else {})
    Y, *last = run(model(cell, direction, uneven, functions, weights, given), given)

    wide = tuple(tuple(a.astype(np.float64) for a in own) for own in weights)
    first = tuple(s.astype(np.float64) for s in state.values())
    options = dict(row.options)
    if functions != Functions(PLAIN.get(row.kind, ("tanh",))):
        options |= {"activations": functions.activations, "clip": functions.clip}
    forward = getattr(functional, f"{row.kind.lower()}_forward")
    y, state_n, _ = forward(
        x.astype(np.float64), first if len(first) == 2 else first[0], wide if D == 2 else wide[0],
        lengths=LENGTHS if uneven else None, reverse=direction == "reverse", **options,
    )  # fmt: skip
    context = f"{cell} {direction} {uneven=} {functions}"
    Y = np.concatenate(list(Y.swapaxes(0, 1)), axis=2)  # [T, D, B, H]
    assert_close("y", Y, y, np.float32, context=context)
    assert not uneven or not Y[past_lengths(LENGTHS, T, B)].any()
    for name, got, want in zip(
        row.states, last, state_n if isinstance(state_n, tuple) else (state_n,), strict=True
    ):
        assert_close(f"{name}_n", got, want, np.float32, context=context)


@pytest.fixture(scope="module")
def runtime():
    """Runs a model by ONNX Runtime."""
    library = pytest.importorskip("onnxruntime")

    def run(made, given):
        options = library.SessionOptions()
        options.intra_op_num_threads = 1
        session = library.InferenceSession(
            made.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, given)

    return run


@pytest.mark.parametrize("uneven", [False, True], ids=["all valid", "uneven"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "cell",
    [cell for cell, row in CELLS.items() if not (row.general or row.norms)],  # ONNX has not
)
def test_plain_cells(cell, direction, uneven, runtime):
    usual = (CELLS[cell].options.get("nonlinearity"),)
    functions = Functions(PLAIN.get(CELLS[cell].kind, usual))
    compare(cell, direction, uneven, functions, runtime)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if CELLS[cell].general])
def test_activations_and_clip(cell, direction, runtime):
    """Each activation in each place; ONNX has no limit of c."""
    seen = set()
    for turn in range(TURNS // 3):
        functions = draw_functions(cell, turn)._replace(cell_clip=None)
        compare(cell, direction, turn % 2 == 1, functions, runtime, turn)
        seen |= {
            (place, a if isinstance(a, str) else a[0])
            for place, a in enumerate(functions.activations)
        }
    assert len(seen) == len(functions.activations) * len(ACTIVATIONS)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if CELLS[cell].general])
def test_clip_alone(cell, runtime):
    functions = Functions(PLAIN.get(CELLS[cell].kind, ("tanh",)), 0.5)
    for direction in DIRECTIONS:
        compare(cell, direction, True, functions, runtime)


@pytest.mark.parametrize("name", ["leakyrelu", "elu", "hardsigmoid"])
def test_defaults_of_alpha_and_beta(name, runtime):
    """Those of ONNX Runtime where it has ONNX's: of thresholdedrelu it takes 0 for alpha, and of
    affine and scaledtanh, for which ONNX names none, 0 for both, which is 0 everywhere."""
    rng = np.random.default_rng(0)
    weights = make_weights("rnn_general", I, H, rng, kind="hard")
    weights = [tuple(a.astype(np.float32) for a in weights)]
    given = {"x": rng.standard_normal((T, B, I)).astype(np.float32)}
    given["h_0"] = np.zeros((1, B, H), np.float32)
    Y, _ = runtime(
        model("rnn_general", "forward", False, Functions((name,)), weights, given), given
    )
    wide = tuple(a.astype(np.float64) for a in weights[0])
    y, _, _ = functional.rnn_forward(given["x"].astype(np.float64), None, wide, activations=(name,))
    assert_close("y", Y[:, 0], y, np.float32, context=name)


# onnx.reference runs GRUs forward alone.
ITSELF = [("lstm", d) for d in DIRECTIONS] + [("lstm_peephole", d) for d in DIRECTIONS]
ITSELF += [(cell, "forward") for cell in ("rnn_tanh", "gru", "gru_reset_before")]


@pytest.mark.parametrize(("cell", "direction"), ITSELF)
def test_plain_cells_against_onnx_itself(cell, direction):
    from onnx.reference import ReferenceEvaluator

    def run(made, given):
        return ReferenceEvaluator(made).run(None, given)

    functions = Functions(PLAIN.get(CELLS[cell].kind, ("tanh",)))
    compare(cell, direction, False, functions, run)
