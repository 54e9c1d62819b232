"""The closed loop: generation, forecasts, and training on own predictions.

Knows the reference and the public API. Bad input is in test_bad_input, Ctrl-C in test_process.
"""

import copy
import itertools
import pickle

import numpy as np
import pytest
from cases import DTYPES, FUNCTIONS, GAINS, as_state, as_tuple, make_module
from test_reference import assert_near, complex_step
from tolerances import assert_close, assert_same_bits

import rnnfast
from rnnfast import _kernels, reference
from rnnfast.cells import CELLS
from rnnfast.learn import Adam

LSTMS = [name for name, cell in CELLS.items() if cell.kind == "LSTM"]
# Cells, layers and P.
STACKS = [(cell, L, 0) for cell in CELLS for L in (1, 2)] + [(cell, 2, 5) for cell in LSTMS]
T, B, O, K, H = 9, 3, 4, 2, 17


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(cell, I, L=1, P=0, *, H=H, dtype="float32", **options):
    """A module, a random state for B rows, and its parameters in float64."""
    projected = {"proj_size": P} if P else {}
    module = make_module(cell, I, H, L, dtype=dtype, seed=3, **projected, **options)
    for name, param in module.params.items():  # gains of one may pass on errors undamped
        param *= GAINS.get(name.partition("_l")[0], 1)
    sizes = (P or H, H)[: len(CELLS[cell].states)]
    state = tuple(random(L, B, n, seed=n, dtype=dtype) / 2 for n in sizes)
    return module, state, {name: a.astype(np.float64) for name, a in module.params.items()}


def make_head(O, N, dtype="float32", scale=1.0):
    return random(O, N, seed=5, dtype=dtype) * dtype_of(dtype)(scale * N**-0.5), random(
        O, seed=6, dtype=dtype
    )


def dtype_of(name):
    return np.dtype(name).type


def double(value):
    """Arrays, tuples of such and None, in float64; masks as they are."""
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value if value is None or value.dtype == bool else value.astype(np.float64)


def forecast(cell, L, P, dtype, with_more):
    """A module and the arguments of a forecast: (module, state, parameters, arguments, others)."""
    module, state, params = make(cell, O + K * with_more, L, P, dtype=dtype)
    arguments = random(B, O, seed=7, dtype=dtype), T, make_head(O, P or H, dtype)
    others = {}
    if with_more:
        mask = np.random.default_rng(8).random((T, B)) < 0.4
        mask[0, 0] = True
        others["covariates"] = random(T, B, K, seed=9, dtype=dtype)
        others["teacher"] = random(T, B, O, seed=10, dtype=dtype), mask
    return module, state, params, arguments, others


# --------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("with_more", [False, True], ids=["plain", "covariates and teacher"])
@pytest.mark.parametrize(("cell", "layers"), [("gru", 1), ("lstm", 2), ("rnn_tanh", 2)])
def test_gradients_of_the_reference(cell, layers, with_more):
    """By the complex step, as in test_reference."""
    I, N, steps = (3 if with_more else 2), 3, 3
    rng = np.random.default_rng(1)
    params = {
        name: array.astype(np.float64)
        for name, array in make_module(cell, I, N, layers, seed=1).params.items()
    }
    first, d_outputs = rng.standard_normal((2, 2)), rng.standard_normal((steps, 2, 2))
    state, dstate = (
        tuple(rng.standard_normal((layers, 2, N)) for _ in CELLS[cell].states) for _ in range(2)
    )
    head = rng.standard_normal((2, N)), rng.standard_normal(2)
    more = {}
    if with_more:
        mask = np.array([[False, True], [True, False], [False, False]])
        more["teacher"] = rng.standard_normal((steps, 2, 2)), mask
        more["covariates"] = rng.standard_normal((steps, 2, 1))
    n = len(state)

    of_cell = dict(functions=FUNCTIONS[cell])

    def loss(first, weight, bias, *rest):
        named = dict(zip(params, rest[n:], strict=True))
        o, _, last, _ = reference.closed_loop(
            cell, first, steps, rest[:n], named, (weight, bias), **more, **of_cell
        )
        return (o * d_outputs).sum() + sum((s * d).sum() for s, d in zip(last, dstate, strict=True))

    *_, tapes = reference.closed_loop(cell, first, steps, state, params, head, **more, **of_cell)
    teacher = more.get("teacher")
    got = reference.closed_loop_backward(
        cell, tapes, params, head, d_outputs, dstate, teacher=teacher, **of_cell
    )
    want = complex_step(loss, [first, *head, *state, *params.values()])
    for name, need in zip(("first", "weight", "bias"), want[:3], strict=True):
        assert_near(name, got[name], need)
    for have, need in zip(got["state"], want[3 : 3 + n], strict=True):
        assert_near("state", have, need)
    for name, need in zip(params, want[3 + n :], strict=True):
        assert_near(name, got[name], need)


def test_numbers_that_decide_draws_are_uniform():
    numbers = np.array([reference.uniform(3, t, b) for t in range(50) for b in range(50)])
    counts, _ = np.histogram(numbers, 10, (0, 1))
    assert abs(counts - 250).max() < 5 * 250**0.5
    assert len(set(numbers)) == 2500


# ------------------------------------------------------------------------------------- forecasts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cell", "layers", "P"), STACKS)
def test_a_forecast_is_the_references(cell, layers, P, dtype):
    for with_more, isa in itertools.product((False, True), _kernels.ISAS):
        if not _kernels.set_isa(isa):
            continue
        try:
            module, state, params, arguments, others = forecast(cell, layers, P, dtype, with_more)
            others.pop("teacher", None)
            given = as_state(cell, state)
            values, last = module.generate(*arguments, state=given, **others)
        finally:
            _kernels.set_isa("auto")
        first, steps, head = arguments
        known = double(others.get("covariates"))
        want, _, states, _ = reference.closed_loop(
            cell, double(first), steps, double(state), params, double(head), covariates=known,
            functions=FUNCTIONS[cell],
        )  # fmt: skip
        context = f"{cell}, {layers} layers, P={P}, {dtype}, {isa}, covariates: {with_more}"
        assert_close("values", values, want, dtype, context=context, time_axis=0)
        for have, need in zip(as_tuple(last), states, strict=True):
            assert_close("state", have, need, dtype, context=context)


@pytest.mark.parametrize("with_more", [False, True], ids=["plain", "covariates and teacher"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cell", "layers", "P"), STACKS)
def test_training_on_own_predictions_is_the_references(cell, layers, P, dtype, with_more):
    module, state, params, arguments, others = forecast(cell, layers, P, dtype, with_more)
    values, last, tape = module.forecast_train(*arguments, as_state(cell, state), **others)
    dvalues = random(T, B, O, seed=11, dtype=dtype)
    dstate = tuple(random(*s.shape, seed=12, dtype=dtype) for s in state)
    got = module.backward_forecast(tape, dvalues, as_state(cell, dstate))

    first, steps, head = arguments
    more = {name: double(value) for name, value in others.items()}
    want, _, states, tapes = reference.closed_loop(
        cell, double(first), steps, double(state), params, double(head), **more,
        functions=FUNCTIONS[cell],
    )  # fmt: skip
    assert_close("values", values, want, dtype, time_axis=0)
    for have, need in zip(as_tuple(last), states, strict=True):
        assert_close("state", have, need, dtype)
    grads = reference.closed_loop_backward(
        cell, tapes, params, double(head), double(dvalues), double(dstate),
        teacher=more.get("teacher"), functions=FUNCTIONS[cell],
    )  # fmt: skip
    for name in ("first", "weight", "bias"):
        assert_close(name, getattr(got, name), grads[name], dtype, "gradient")
    for have, need in zip(as_tuple(got.state), grads["state"], strict=True):
        assert_close("dstate", have, need, dtype, "gradient")
    for name, grad in module.grads.items():
        assert_close(name, grad, grads[name], dtype, "gradient")
    if with_more:
        assert_close("covariates", got.covariates, grads["x"][:, :, O:], dtype, "gradient")
        assert not got.first[0].any()  # the teacher's turn
    else:
        assert got.covariates is None


@pytest.mark.parametrize(("cell", "layers", "P"), STACKS)
def test_training_on_own_predictions_is_a_chain_of_single_steps(cell, layers, P):
    """Forward to the bits of a generation; backward beside module calls of one step each."""
    module, state, _, (first, _, head), _ = forecast(cell, layers, P, "float64", False)
    given = as_state(cell, state)
    values, last, tape = module.forecast_train(first, T, head, given)
    plain, plain_last = module.generate(first, T, head, "value", given)
    assert_same_bits("values", values, plain)
    for have, need in zip(as_tuple(last), as_tuple(plain_last), strict=True):
        assert_same_bits("state", have, need)
    dvalues = random(T, B, O, seed=11, dtype="float64")
    got = module.backward_forecast(tape, dvalues, accumulate=False)
    in_one = module.flat_grads.copy()

    module.zero_grad()
    x, now, chain = first, given, []
    for _ in range(T):
        y, now, one = module.forward_train(x[None], now)
        x = y[0] @ head[0].T + head[1]
        chain.append(one)
    carried, d_state = 0, None
    for t in reversed(range(T)):
        d_o = dvalues[t] + carried
        dx, d_state = module.backward(chain[t], (d_o @ head[0])[None], d_state)
        carried = dx[0]
    assert_close("first", got.first, carried, "float64", "gradient")
    assert_close("grads", in_one, module.flat_grads, "float64", "gradient")
    for have, need in zip(as_tuple(got.state), as_tuple(d_state), strict=True):
        assert_close("state", have, need, "float64", "gradient")


def test_scheduled_sampling_learns_a_wave():
    """What it is for: given ever fewer true inputs, a model learns to do without them."""
    wave = np.sin(np.arange(40) / 3).astype(np.float32)[:, None, None]
    lstm, rng = rnnfast.LSTM(1, 16, seed=0), np.random.default_rng(0)
    flat, grads = np.zeros(17, np.float32), np.zeros(17, np.float32)  # of the head
    flat[:16] = rng.normal(size=16) / 4
    head = flat[:16].reshape(1, 16), flat[16:]
    adam = Adam([(lstm.flat, lstm.flat_grads), (flat, grads)], lr=0.02)
    for k in range(300):
        mask = rng.random((39, 1)) > k / 200
        mask[:10] = True
        values, _, tape = lstm.forecast_train(wave[0], 39, head, teacher=(wave[:-1], mask))
        error = values - wave[1:]
        got = lstm.backward_forecast(tape, 2 * error / error.size, accumulate=False)
        grads[:16], grads[16:] = got.weight[0], got.bias
        adam.step()
    _, state = lstm(wave[:10])
    values, _ = lstm.generate(wave[10], 29, head, state=state)
    assert np.mean((values - wave[11:]) ** 2) < 0.01


def test_gradients_add_up_or_replace():
    module, state, _, arguments, _ = forecast("lstm", 2, 0, "float32", False)
    values, _, tape = module.forecast_train(*arguments, state)
    module.backward_forecast(tape, values)
    once = module.flat_grads.copy()
    module.backward_forecast(tape, values)
    np.testing.assert_allclose(module.flat_grads, 2 * once, rtol=1e-6)
    module.backward_forecast(tape, values, accumulate=False)
    assert_same_bits("grads", module.flat_grads, once)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_tape_can_be_copied(copied):
    module, state, _, arguments, others = forecast("lstm", 2, 0, "float32", True)
    values, _, tape = module.forecast_train(*arguments, state, **others)
    want = module.backward_forecast(tape, values)
    got = module.backward_forecast(copied(tape), values)
    for name in ("first", "covariates", "weight", "bias"):
        assert_same_bits(name, getattr(got, name), getattr(want, name))
    assert tape.nbytes == copied(tape).nbytes > tape.stack.nbytes


def test_tapes_that_do_not_belong_are_refused():
    module, state, _, arguments, _ = forecast("lstm", 1, 0, "float32", False)
    values, _, tape = module.forecast_train(*arguments, state)
    before = module.flat_grads.copy()
    other = copy.deepcopy(module)
    for wrong, words in (
        (tape.stack, "tape: got StackTape; needs what forecast_train returned"),
        (None, "tape: got None; needs what forecast_train returned"),
    ):
        with pytest.raises(TypeError, match=words):
            module.backward_forecast(wrong, values)
    with pytest.raises(ValueError, match="tape: got one of another module"):
        other.backward_forecast(tape, values)
    for name, value in (
        ("_weight", np.zeros((O, H + 1), np.float32)),
        ("_weight", None),
        ("_own", np.ones((T, B + 1), bool)),
        ("_layout", (True,)),
        ("_layout", (False, True)),
    ):
        altered = copy.deepcopy(tape)
        setattr(altered, name, value)
        with pytest.raises(ValueError, match="tape: got an altered one"):
            module.backward_forecast(altered, values)
    assert_same_bits("grads", module.flat_grads, before)


# ---------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layouts(cell):
    """batch_first turns sequences; a row without its axis is one of a batch of 1."""
    module, state, _, (first, steps, head), others = forecast(cell, 2, 0, "float32", True)
    turned, _, _ = make(cell, O + K, 2, batch_first=True)
    given = as_state(cell, state)
    inputs, mask = others["teacher"]
    flipped = {
        "covariates": np.swapaxes(others["covariates"], 0, 1),
        "teacher": (np.swapaxes(inputs, 0, 1), np.ascontiguousarray(mask.T)),
    }
    values, last, tape = module.forecast_train(first, steps, head, given, **others)
    got, _, got_tape = turned.forecast_train(first, steps, head, given, **flipped)
    assert_same_bits("values", np.swapaxes(got, 0, 1), values)
    assert got.flags.c_contiguous
    want = module.backward_forecast(tape, values)
    grads = turned.backward_forecast(got_tape, got)
    assert_same_bits("covariates", np.swapaxes(grads.covariates, 0, 1), want.covariates)
    assert_same_bits("grads", turned.flat_grads, module.flat_grads)

    alone = {
        "covariates": others["covariates"][:, 1],
        "teacher": (inputs[:, 1], mask[:, 1]),
    }
    one_state = as_state(cell, tuple(s[:, 1] for s in state))
    for each in (module, turned):
        row, row_last, row_tape = each.forecast_train(first[1], steps, head, one_state, **alone)
        assert_same_bits("row", row, np.ascontiguousarray(values[:, 1]))
        for have, need in zip(as_tuple(row_last), as_tuple(last), strict=True):
            assert_same_bits("state", have, np.ascontiguousarray(need[:, 1]))
        g = each.backward_forecast(row_tape, row)
        assert_same_bits("first", g.first, want.first[1])
        assert g.covariates.shape == (T, K)
        assert_same_bits("dstate", as_tuple(g.state)[0], as_tuple(want.state)[0][:, 1])


@pytest.mark.parametrize("T, B", [(0, 3), (0, 0), (4, 0), (1, 1)])
@pytest.mark.parametrize("cell", ["lstm", "rnn_relu"])
def test_nothing_and_next_to_nothing(cell, T, B):
    module = make_module(cell, O, H, 2, seed=1)
    head, first = make_head(O, H), random(B, O)
    names = CELLS[cell].states
    state = as_state(cell, tuple(random(2, B, H, seed=i) for i in range(len(names))))
    values, last = module.generate(first, T, head, "value", state)
    assert values.shape == (T, B, O)
    kept, _, tape = module.forecast_train(first, T, head, state)
    assert_same_bits("values", kept, values)
    g = module.backward_forecast(tape, values, last)
    assert g.first.shape == (B, O)
    if T == 0:
        for have, need in zip(as_tuple(last), as_tuple(state), strict=True):
            assert_same_bits("state", have, need)
        for have, need in zip(as_tuple(g.state), as_tuple(last), strict=True):
            assert_same_bits("dstate", have, need)
        assert not g.first.any() and not module.flat_grads.any()
    tokens, _ = module.generate(np.zeros(B, int), T, head, "sample", state, seed=1)
    assert tokens.shape == (T, B) and tokens.dtype == np.intp


# ----------------------------------------------------------------------------------------- tokens

V, E = 21, 6


def one_of(logits, temperature, u, token, dtype):
    """Whether u draws this token of the logits, or is nearer to doing so than rounding tells."""
    logits = logits.astype(np.float64)
    terms = np.exp((logits - logits.max()) / temperature)
    sums = np.concatenate([[0], np.cumsum(terms)])
    near = 8 * np.finfo(dtype).eps * sums[-1] * max(1, abs(logits).max() / temperature)
    return sums[token] - near <= u * sums[-1] <= sums[token + 1] + near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [True, False], ids=["table", "one-hot"])
@pytest.mark.parametrize(("cell", "layers", "P"), STACKS)
def test_tokens_are_the_references(cell, layers, P, table, dtype):
    """In float64 the very same tokens; in float32 those of its own logits, which are the
    reference's for these tokens."""
    I = E if table else V
    module, state, params = make(cell, I, layers, P, dtype=dtype)
    head = make_head(V, P or H, dtype, scale=3)
    rows = random(V, E, seed=4, dtype=dtype) if table else None
    first = [0, V - 1, 5]
    given, known = as_state(cell, state), np.eye(V) if rows is None else double(rows)
    for choice, options in (("argmax", {}), ("sample", {"temperature": 0.7, "seed": 12})):
        tokens, last, logits = module.generate(
            first, T, head, choice, given, table=rows, logits=True, **options
        )
        assert tokens.shape == (T, B) and logits.shape == (T, B, V)
        want, chosen, states, _ = reference.closed_loop(
            cell, first, T, double(state), params, double(head), choice=choice, table=known,
            functions=FUNCTIONS[cell], **options,
        )  # fmt: skip
        if dtype == "float64":
            assert tokens.tolist() == chosen.tolist()
            assert_close("logits", logits, want, dtype)
            for have, need in zip(as_tuple(last), states, strict=True):
                assert_close("state", have, need, dtype)
            continue
        x = known[np.concatenate([[first], tokens[:-1]])]
        y, _, _ = reference.stack_forward(cell, x, double(state), params, functions=FUNCTIONS[cell])
        assert_close("logits", logits, y @ double(head[0]).T + double(head[1]), dtype)
        for t, b in np.ndindex(T, B):
            if choice == "argmax":
                assert tokens[t, b] == logits[t, b].argmax()
            else:
                u = reference.uniform(12, t, b)
                assert one_of(logits[t, b], 0.7, u, tokens[t, b], dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", _kernels.ISAS)
def test_a_one_hot_input_is_a_column_and_no_product(cell, isa, use_isa):
    """To the bits of the products with one-hot vectors, by a stream's steps."""
    use_isa(isa)
    module, state, _ = make(cell, V, 2)
    head, given = make_head(V, H), as_state(cell, state)
    tokens, last, logits = module.generate([1, 2, 3], T, head, "argmax", given, logits=True)
    again = module.generate(
        [1, 2, 3], T, head, "argmax", given, logits=True, table=np.eye(V, dtype=np.float32)
    )
    assert_same_bits("tokens", again[0], tokens)
    assert_same_bits("logits", again[2], logits)
    stream = module.stream(B)
    stream.state = given
    for now in [[1, 2, 3], *tokens[:-1]]:
        stream.step(np.eye(V, dtype=np.float32)[now])
    for have, need in zip(as_tuple(stream.state), as_tuple(last), strict=True):
        assert_same_bits("state", have, need)


def test_draws_have_their_probabilities():
    module = rnnfast.RNN(5, 3, seed=0)
    bias = np.array([0, 1, -np.inf, 2, -1], np.float32)
    head = np.zeros((5, 3), np.float32), bias
    rows, steps = 2000, 5
    tokens, _ = module.generate(np.zeros(rows, int), steps, head, "sample", seed=4, temperature=2)
    p = np.exp(bias / 2)
    p /= p.sum()
    counts = np.bincount(tokens.ravel(), minlength=5)
    n = rows * steps
    assert counts[2] == 0
    assert (abs(counts - n * p) <= 5 * (n * p * (1 - p)) ** 0.5).all()
    greedy, _ = module.generate([0, 1], 2, head, "argmax")
    assert greedy.tolist() == [[3, 3], [3, 3]]


def test_the_first_of_equal_logits_is_the_greatest():
    module = rnnfast.RNN(40, 3, seed=0)
    for at in ([0, 39], [7, 8], [31, 33], [39]):
        bias = np.full(40, -1.5, np.float32)
        bias[at] = -0.5
        tokens, _ = module.generate(0, 1, (np.zeros((40, 3), np.float32), bias), "argmax")
        assert tokens.tolist() == [at[0]]


@pytest.mark.parametrize("choice", ["argmax", "sample"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_of_which_nothing_can_be_chosen(choice, wrong):
    """A NaN for any; for a draw also a +inf, or nothing but -inf. The states stay."""
    module = rnnfast.LSTM(V, H, seed=0)
    weight, bias = make_head(V, H)
    stream = module.stream(B)
    stream.generate([1, 2, 3], 2, (weight, bias), "argmax")
    before = [a.tobytes() for a in stream.state]
    bias[3 if wrong != -np.inf else slice(None)] = wrong
    options = {"seed": 1} if choice == "sample" else {}
    if choice == "argmax" and not np.isnan(wrong):
        tokens = stream.generate([1, 2, 3], 2, (weight, bias), choice)
        assert (tokens == (3 if wrong > 0 else 0)).all()
        return
    words = r"head: got logits of which no token can be chosen, in step 0 of row 0; needs"
    with pytest.raises(ValueError, match=words):
        stream.generate([1, 2, 3], 2, (weight, bias), choice, **options)
    assert [a.tobytes() for a in stream.state] == before


@pytest.mark.parametrize("choice", ["argmax", "sample"])
@pytest.mark.parametrize("V", [1, 3, 4, 8, 9, 16, 21, 33])
def test_a_nan_is_seen_wherever_it_is(V, choice):
    gru = rnnfast.GRU(V, H, seed=0)
    options = {"seed": 1} if choice == "sample" else {}
    for at in {0, V // 2, V - 1}:
        weight, bias = make_head(V, H)
        bias[at] = np.nan
        with pytest.raises(ValueError, match="step 0 of row 0"):
            gru.generate([0], 2, (weight, bias), choice, **options)


@pytest.mark.parametrize("choice", ["argmax", "sample"])
def test_step_and_row_without_a_token_are_named(choice):
    """Tokens are counted up to the one whose input is a NaN: a row meets it when it is there."""
    rnn = rnnfast.RNN(4, 1, nonlinearity="relu", seed=0)
    rnn.flat[...] = 0
    rnn.params["weight_ih_l0"][...] = 1
    # h is the input's number; of h = k, the greatest logit is that of token k + 1, and far ahead.
    table = np.array([[0], [1], [2], [np.nan]], np.float32) @ np.ones((1, 4), np.float32) / 4
    k = np.arange(4, dtype=np.float32)
    head = 2e4 * (k[:, None] - 1), -1e4 * (k - 1) ** 2
    options = {"seed": 1} if choice == "sample" else {}
    tokens, _ = rnn.generate([0], 3, head, choice, table=table, **options)
    assert tokens[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="in step 3 of row 0"):
        rnn.generate([0, 0], 5, head, choice, table=table, **options)
    with pytest.raises(ValueError, match="in step 1 of row 2"):
        rnn.generate([0, 0, 2], 5, head, choice, table=table, **options)


def test_draws_are_numbered_by_step_up_to_a_last_one():
    """Each step has draws of its own, up to the last that there can be."""
    gru = rnnfast.GRU(V, H, seed=0)
    head, last = make_head(V, H), 2**32
    draws = [
        gru.generate([0, 1, 2], 5, head, "sample", seed=3, step0=step0)[0]
        for step0 in (0, 5, 2**31, last - 5)
    ]
    assert len({tokens.tobytes() for tokens in draws}) == 4
    apart = gru.generate([0, 1, 2], 1, head, "sample", seed=3, step0=last - 5)[0]
    assert_same_bits("tokens", apart, draws[3][:1])
    uniform = [reference.uniform(3, t, 1) for t in (0, last - 1)]
    assert 0 <= min(uniform) < max(uniform) < 1
    for step0, words in ((last - 4, "steps: got 5 from step"), (last + 1, "step0: got")):
        with pytest.raises(ValueError, match=words):
            gru.generate([0], 5, head, "sample", seed=3, step0=step0)


def test_gradients_of_the_heads_bias_lose_no_rows():
    """Each of a hundred thousand rows gives it the same number."""
    gru = rnnfast.GRU(2, 4, seed=0)
    head = np.zeros((2, 4), np.float32), np.zeros(2, np.float32)
    values, _, tape = gru.forecast_train(np.zeros((50, 2), np.float32), 2000, head)
    g = gru.backward_forecast(tape, np.full_like(values, 0.1))
    np.testing.assert_allclose(g.bias, 50 * 2000 * np.float64(np.float32(0.1)), rtol=1e-6)


def test_no_rows_take_no_time():
    lstm = rnnfast.LSTM(O, H)
    values, _ = lstm.generate(np.zeros((0, O), np.float32), 10**12, make_head(O, H))
    assert values.shape == (10**12, 0, O)


def test_a_nan_forecast_is_a_result():
    module = rnnfast.GRU(O, H, seed=0)
    first = random(B, O)
    first[1, 2] = np.nan
    values, _, tape = module.forecast_train(first, 3, make_head(O, H))
    assert np.isnan(values[:, 1]).all() and np.isfinite(values[:, [0, 2]]).all()
    module.backward_forecast(tape, np.ones_like(values))
    assert np.isnan(module.flat_grads).any()


# ------------------------------------------------------------------------------------ determinism

# Rows that no number of threads divides, heads of several groups of blocks and of less than one.
LOOPS = [(1, 200, 300), (29, 40, 70), (5, 130, 9)]


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "H", "V"), LOOPS)
def test_threads_and_plans_change_no_bit(rows, H, V, dtype, isa, use_isa, choose):
    use_isa(isa)
    lstm = rnnfast.LSTM(V, H, 2, dtype=dtype, seed=1)
    head, first = make_head(V, H, dtype), random(rows, V, dtype=dtype)
    dvalues = random(6, rows, V, seed=2, dtype=dtype)

    def everything():
        lstm.zero_grad()
        values, state, tape = lstm.forecast_train(first, 6, head)
        g = lstm.backward_forecast(tape, dvalues)
        tokens, last, logits = lstm.generate(
            np.arange(rows) % V, 6, head, "sample", seed=3, logits=True
        )
        greedy, _ = lstm.generate(np.arange(rows) % V, 6, head, "argmax", state)
        arrays = (values, *state, g.first, *g.state, lstm.flat_grads, tokens, *last, logits, greedy)
        return [a.tobytes() for a in arrays], tape.threads

    choose(1)
    want, _ = everything()
    ran = set()
    for threads, plan in itertools.product((2, 3, 7), ("auto", "batch", "units", "serial")):
        choose(threads, plan)
        got, used = everything()
        assert got == want, (threads, plan)
        ran.add(used)
    assert max(ran) > 1


@pytest.mark.parametrize("choice", ["value", "sample"])
def test_rows_and_steps_may_be_computed_apart(choice):
    rows, steps = 7, 8
    lstm = rnnfast.LSTM(V, H, 2, seed=1)
    head = make_head(V, H)
    first = random(rows, V) if choice == "value" else np.arange(rows)

    def run(first, steps, state, t, b):
        how = {} if choice == "value" else dict(seed=9, step0=t, row0=b)
        return lstm.generate(first, steps, head, choice, state, **how)

    want, last = run(first, steps, None, 0, 0)
    parts = []
    for r0, r1 in ((0, 2), (2, 3), (3, 7)):
        now, state, t, done = first[r0:r1], None, 0, []
        for n in (1, 3, 4):
            part, state = run(now, n, state, t, r0)
            now, t = part[-1], t + n
            done.append(part)
        parts.append(np.concatenate(done))
        for have, need in zip(state, last, strict=True):
            assert_same_bits("state", have, np.ascontiguousarray(need[:, r0:r1]))
    assert_same_bits("results", np.concatenate(parts, axis=1), want)


def test_a_seed_that_is_not_given_is_drawn():
    gru = rnnfast.GRU(V, H, seed=1)
    head = make_head(V, H)
    runs = {gru.generate(0, 60, head, "sample")[0].tobytes() for _ in range(3)}
    assert len(runs) == 3


# ----------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_stream_generates_as_its_module_does(cell, frozen):
    module, _, _ = make(cell, O, 2)
    if frozen:
        module.freeze()
    head, x = make_head(O, H), random(T, B, O)
    stream = module.stream(B)
    y = stream.process(x)
    first = y[-1] @ head[0].T + head[1]
    want, last = module.generate(first, T, head, state=module(x)[1])
    got = np.concatenate([stream.generate(first, 4, head), stream.generate(want[3], 5, head)])
    assert_same_bits("values", got, want)
    for have, need in zip(as_tuple(stream.state), as_tuple(last), strict=True):
        assert_same_bits("state", have, need)
    assert_same_bits("y", stream.process(x[:1]), module(x[:1], last)[0])


def test_a_single_row_of_a_stream_comes_with_or_without_its_axis():
    module, _, _ = make("gru", V)
    head, stream = make_head(V, H), module.stream()
    row = stream.generate(3, 5, head, "argmax")
    stream.reset()
    with_axis, logits = stream.generate([3], 5, head, "argmax", logits=True)
    assert row.shape == (5,) and with_axis.shape == (5, 1) and logits.shape == (5, 1, V)
    assert row.tolist() == with_axis[:, 0].tolist()
    with pytest.raises(
        ValueError, match=r"first: got .*; needs \[B\] with B = 1, or without the B"
    ):
        stream.generate([3, 4], 5, head, "argmax")
    with pytest.raises(ValueError, match=r"first: got .*; needs \[B, 21\] with B = 3"):
        module.stream(3).generate(np.zeros(V, np.float32), 5, head)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_learned_initial_states_are_those_of_a_loop_without_a_state(cell):
    module, state, _ = make(cell, O, 2, learn_initial=True)
    names = ("h_0", "c_0")[: len(state)]
    for name in names:
        module.params[name] = random(*module.params[name].shape, seed=2)
    head, first = make_head(O, H), random(B, O)
    start = as_state(cell, tuple(np.repeat(module.params[name], B, axis=1) for name in names))
    want, _ = module.generate(first, T, head, state=start)
    assert_same_bits("values", module.generate(first, T, head)[0], want)
    assert_same_bits("values", module.stream(B).generate(first, T, head), want)
    for given, learned in ((None, True), (start, False)):
        values, _, tape = module.forecast_train(first, T, head, given)
        assert_same_bits("values", values, want)
        got = module.backward_forecast(tape, values, accumulate=False)
        for name, by_row in zip(names, as_tuple(got.state), strict=True):
            want_grad = by_row.astype(np.float64).sum(axis=1, keepdims=True) * learned
            assert_close(name, module.grads[name], want_grad, "float32", "gradient")


@pytest.mark.parametrize(("cell", "zoneout"), [("lstm", (0.2, 0.4)), ("gru", 0.3)])
def test_regularisation_is_that_of_inference(cell, zoneout):
    """Zoneout as expected, no dropout: as a stream's steps, or calls of one step."""
    module, _, _ = make(cell, V, 2, zoneout=zoneout, dropout=0.5, recurrent_dropout=0.5)
    head, eye = make_head(V, H), np.eye(V, dtype=np.float32)
    tokens, last, logits = module.generate([1, 2, 3], T, head, "argmax", logits=True)
    stream, state = module.stream(B), None
    for now, o in zip([[1, 2, 3], *tokens[:-1]], logits, strict=True):
        y, state = module(eye[now][None], state)
        assert_same_bits("y", stream.step(eye[now]), y[0])
        assert_close("logits", o, double(y[0]) @ double(head[0]).T + double(head[1]), "float32")
    for have, need in zip(as_tuple(last), as_tuple(state), strict=True):
        assert_same_bits("state", have, need)
    stream.reset()
    assert_same_bits("tokens", stream.generate([1, 2, 3], T, head, "argmax"), tokens)


# ------------------------------------------------------------------------------------ refused, told


def test_what_cannot_be_is_refused_with_its_reason():
    gru = rnnfast.GRU(O, H, seed=1)
    head, first = make_head(O, H), random(B, O)
    tall, wide = make_head(O + 1, H), make_head(O - 1, H)
    two = rnnfast.GRU(O, H, bidirectional=True)
    dropping = rnnfast.GRU(O, H, 2, dropout=0.5)
    zoned = rnnfast.GRU(O, H, zoneout=0.1)
    recurrent = rnnfast.GRU(O, H, recurrent_dropout=0.1)
    connect = rnnfast.GRU(O, H, drop_connect=0.1)
    for call, words in (
        (lambda: zoned.forecast_train(first, 3, head), "zoneout=0.1; needs a module without"),
        (lambda: recurrent.forecast_train(first, 3, head), "recurrent_dropout=0.1; needs"),
        (lambda: connect.forecast_train(first, 3, head), "drop_connect=0.1; needs"),
        (lambda: two.generate(first, 3, head), "one direction: the other one starts"),
        (lambda: dropping.forecast_train(first, 3, head), "a module without dropout"),
        (lambda: gru.generate(first, 3, head, "topk"), "'value' or 'argmax' or 'sample'"),
        (lambda: gru.generate(first, 3, tall), "output of at most input_size, 4 numbers"),
        (lambda: gru.generate(first[:, 1:], 3, wide), "covariates: got None; needs the other 1"),
        (lambda: gru.generate(first, 3, head, covariates=first), "all of the 4 inputs"),
        (lambda: gru.generate(first, 3, head, seed=1), 'choice="value" draws nothing'),
        (lambda: gru.generate(first, 3, head, logits=True), "logits: got True"),
        (lambda: gru.generate(first, 3, head, table=head[0]), "table: got one"),
        (lambda: gru.generate(first, 3, head, step0=2), "step0: got 2"),
        (lambda: gru.generate([0], 3, head, "sample", step0=-1), "step0: got -1"),
        (lambda: gru.generate([0], 3, head, "sample", row0=-1), "row0: got -1"),
        (lambda: gru.generate(first, 2**50, head), "steps: got"),
        (lambda: gru.generate([0], 2**50, head, "argmax"), "steps: got"),
        (lambda: gru.generate([0], 3, head, "argmax", temperature=1), "draws nothing"),
        (lambda: gru.generate([0], 3, head, "sample", temperature=0), 'choice="argmax" takes'),
        (lambda: gru.generate([0], 3, head, "sample", temperature=-1), "needs at least 1.18e-38"),
        (lambda: gru.generate([0], 3, head, "sample", temperature=1e-39), "at least 1.18e-38"),
        (lambda: gru.generate([0], 3, head, "sample", covariates=first), "are numbers"),
        (lambda: gru.generate([0], 3, tall, "argmax"), r"needs a table \[V, I\] = \(5, 4\)"),
        (lambda: gru.generate([4], 3, head, "argmax"), r"first\[0\]: got 4; needs .* 0..3"),
        (lambda: gru.generate(np.array([-1]), 3, head, "argmax"), "first: got -1; needs tokens"),
        (lambda: gru.generate(-1, 3, head, "argmax"), "first: got -1"),
        (lambda: gru.generate(first, -1, head), "steps: got -1"),
        (lambda: gru.generate(first, 3, head[0]), "head: got float32 array"),
        (lambda: gru.generate(first, 3, (head[0].T, None)), r"head \(weight\): got shape"),
        (lambda: gru.generate(first, 3, (head[0], head[1][1:])), r"head \(bias\): got shape"),
    ):
        with pytest.raises((TypeError, ValueError, MemoryError), match=words):
            call()


def test_a_head_of_pytorch_is_taken_as_it_is():
    torch = pytest.importorskip("torch")
    gru, linear = rnnfast.GRU(O, H, seed=1), torch.nn.Linear(H, O)
    values, _ = gru.generate(random(B, O), 3, (linear.weight, linear.bias))
    head = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    assert_same_bits("values", values, gru.generate(random(B, O), 3, head)[0])
