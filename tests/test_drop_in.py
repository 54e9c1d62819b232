"""rnnfast.torch against torch.nn: values, gradients, arguments, errors, and what wraps a module.

Needs PyTorch, and is skipped without. Weights are random and unequal; float32 is judged by torch.nn
in float64 on the same float32 numbers.
"""

import copy
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from cases import make_weights
from tolerances import assert_close, assert_same_bits

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence  # noqa: E402

import rnnfast  # noqa: E402
import rnnfast.torch as drop_in  # noqa: E402
from rnnfast import config  # noqa: E402
from rnnfast.cells import CELLS  # noqa: E402
from rnnfast.torch import bridge, ops, threads  # noqa: E402

LAYERS = "RNN", "LSTM", "GRU"
DTYPES = torch.float32, torch.float64


def names_of(dtype):
    return str(dtype).removeprefix("torch.")


def randomize(module, rng):
    """Weights of our own making, unequal in every gate, into a module of either side."""
    cell = module._cell
    for name, weight in list(module.named_parameters()):
        if not name.startswith("weight_ih"):
            continue
        end = name.removeprefix("weight_ih")
        P = getattr(module, "proj_size", 0)
        made = make_weights(cell, weight.shape[1], module.hidden_size, rng, P=P)
        for parameter, values in zip(CELLS[cell].parameters(P > 0), made, strict=True):
            target = getattr(module, parameter + end, None)
            if target is not None:
                with torch.no_grad():
                    target.copy_(torch.from_numpy(values))


def pair(kind, *sizes, dtype, seed=0, **options):
    """Ours, and torch.nn's in float64 with the same numbers."""
    ours = getattr(drop_in, kind)(*sizes, dtype=dtype, **options)
    randomize(ours, np.random.default_rng(seed))
    theirs = getattr(nn, kind)(*sizes, dtype=torch.float64, **options)
    theirs.load_state_dict({name: p.double() for name, p in ours.state_dict().items()})
    return ours, theirs


def states_of(kind, shape, dtype, generator):
    h = torch.randn(shape, generator=generator, dtype=dtype)
    return (h, torch.randn(shape, generator=generator, dtype=dtype)) if "LSTM" in kind else h


def flat(value):
    """The tensors of a result or of arguments, in order."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in flat(item)]
    return [] if value is None else [value]


def mapped(value, function):
    """The same structure with each floating tensor replaced."""
    if isinstance(value, PackedSequence):
        return PackedSequence(function(value.data), *value[1:])
    if isinstance(value, tuple):
        return tuple(mapped(item, function) for item in value)
    return None if value is None else function(value)


def leaves(arguments, dtype):
    """Arguments as leaves of that dtype which collect gradients."""
    return mapped(arguments, lambda t: t.detach().to(dtype).clone().requires_grad_())


def compare(ours, theirs, arguments, dtype, context):
    """Values, states and every gradient of both."""
    found = []
    for module, kind in ((ours, dtype), (theirs, torch.float64)):
        given = leaves(arguments, kind)
        results = flat(module(*given))
        weights = torch.Generator().manual_seed(1)
        loss = sum((r * torch.randn(r.shape, generator=weights).to(kind)).sum() for r in results)
        module.zero_grad()
        loss.backward()
        parameters = [p.grad for p in module.parameters()]
        found.append((results, [t.grad for t in flat(given)], parameters))
    names = [name for name, _ in ours.named_parameters()]
    for what, kind, got, want in (
        ("result", "forward", found[0][0], found[1][0]),
        ("input", "gradient", found[0][1], found[1][1]),
        ("parameter", "gradient", found[0][2], found[1][2]),
    ):
        assert len(got) == len(want)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert g.shape == w.shape and g.dtype == dtype
            name = names[i] if what == "parameter" else f"{what} {i}"
            values = g.detach().numpy(), w.detach().numpy()
            assert_close(name, *values, np.dtype(names_of(dtype)), kind, context=context)


def drawn(seed):
    """A random configuration and its arguments."""
    rng = random.Random(seed)
    kind = rng.choice(LAYERS)
    options = dict(
        num_layers=rng.choice((1, 1, 2, 3)), bias=rng.random() < 0.8,
        batch_first=rng.random() < 0.5, bidirectional=rng.random() < 0.5,
    )  # fmt: skip
    if kind == "RNN":
        options["nonlinearity"] = rng.choice(("tanh", "relu"))
    projected = kind == "LSTM" and rng.random() < 0.4
    dtype = rng.choice(DTYPES)
    T, B, I = rng.randint(1, 9), rng.randint(1, 6), rng.choice((1, 3, 8))
    # Of a single unit, a gradient is one number, which may be the small difference of large ones.
    H = rng.choice((5, 8, 17) if dtype == torch.float32 else (1, 5, 17))
    generator = torch.Generator().manual_seed(seed)
    form = rng.choice(("plain", "plain", "packed", "packed sorted", "packed equal", "unbatched"))
    if form == "unbatched":
        x = torch.randn(T, I, generator=generator, dtype=dtype)
    elif form == "plain":
        shape = (B, T, I) if options["batch_first"] else (T, B, I)
        x = torch.randn(shape, generator=generator, dtype=dtype)
    else:
        lengths = [T if form == "packed equal" else rng.randint(1, T) for _ in range(B)]
        if form == "packed sorted":
            lengths.sort(reverse=True)
        rows = [torch.randn(t, I, generator=generator, dtype=dtype) for t in lengths]
        x = pack_sequence(rows, enforce_sorted=form == "packed sorted")
    many = options["num_layers"] * (1 + options["bidirectional"])
    shape = (many, H) if form == "unbatched" else (many, B, H)
    hx = states_of(kind, shape, dtype, generator) if rng.random() < 0.5 else None
    if projected and H > 1:
        options["proj_size"] = P = rng.randint(2, H - 1)
        hx = hx and (hx[0][..., :P].contiguous(), hx[1])
    return kind, (I, H), options, dtype, (x, hx), f"{seed=} {kind} {form} {I=} {H=} {options}"


@pytest.mark.parametrize("seed", range(120))
def test_random_configurations(seed):
    kind, sizes, options, dtype, arguments, context = drawn(seed)
    ours, theirs = pair(kind, *sizes, dtype=dtype, seed=seed, **options)
    assert repr(ours) == repr(getattr(nn, kind)(*sizes, **options))
    compare(ours, theirs, arguments, dtype, context)


def test_cells_are_pytorchs_own():
    """A step of one layer has nothing to gain: see convert."""
    for kind in ("RNNCell", "LSTMCell", "GRUCell"):
        assert getattr(drop_in, kind) is getattr(nn, kind)


@pytest.mark.parametrize("kind", LAYERS)
def test_initialisation_and_state_dict_are_theirs(kind):
    options = dict(num_layers=2, bidirectional=True, dtype=torch.float64)
    torch.manual_seed(3)
    ours = getattr(drop_in, kind)(3, 5, **options)
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(3, 5, **options)
    for (name, p), (other, q) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(p, q)
    theirs.reset_parameters()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert [len(w) for w in ours.all_weights] == [len(w) for w in theirs.all_weights]
    assert ours.flatten_parameters() is None


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "negative view", "offset"])
def test_layouts_of_tensors(layout):
    """Any strided tensor is read as it lies or copied: the same bits as its contiguous copy."""
    lstm = drop_in.LSTM(6, 5)
    if layout == "transposed":
        x = torch.randn(6, 4, 3).permute(1, 2, 0)
    elif layout == "strided":
        x = torch.randn(8, 6, 12)[::2, ::2, ::2]
    elif layout == "expanded":
        x = torch.randn(1, 1, 6).expand(4, 3, 6)
    elif layout == "negative view":
        x = torch.view_as_complex(torch.randn(4, 3, 6, 2)).conj().imag
    else:  # a byte off, which PyTorch allows
        raw = torch.randn(4 * 3 * 6).numpy().tobytes()
        x = torch.frombuffer(bytearray(b"." + raw), dtype=torch.float32, offset=1).view(4, 3, 6)
    y, (h_n, _) = lstm(x)
    same, (h_same, _) = lstm(x.clone(memory_format=torch.contiguous_format))
    assert torch.equal(y, same) and torch.equal(h_n, h_same)
    with torch.no_grad():  # weights, too
        for name, p in list(lstm.named_parameters()):
            if p.dim() == 2:
                setattr(lstm, name, nn.Parameter(p.t().contiguous().t()))
    assert torch.equal(lstm(x)[0], same)
    (dx,) = torch.autograd.grad(lstm(x.clone().requires_grad_())[0].sum(), lstm.weight_ih_l0)
    assert dx.shape == (20, 6)


def test_results_share_no_memory_with_what_was_given():
    lstm = drop_in.LSTM(3, 3)
    x, h, c = torch.randn(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    before = x.clone()
    y, (h_n, c_n) = lstm(x, (h, c))
    owners = {t.untyped_storage().data_ptr() for t in (x, h, c, y, h_n, c_n)}
    assert len(owners) == 6 and torch.equal(x, before)


# -------------------------------------------------------------------------------------- gradients


def functional(module, x, weights, state, packed):
    """A module as a function of tensors alone."""
    names = [name for name, _ in module.named_parameters()]
    torch.manual_seed(3)  # of dropout
    given = PackedSequence(x, *packed[1:]) if packed else x
    hx = (state if len(state) > 1 else state[0]) if state else None
    named = dict(zip(names, weights, strict=True))
    return tuple(flat(torch.func.functional_call(module, named, (given, hx))))


@pytest.mark.parametrize(("L", "D", "packed", "dropout"), [
    (1, 1, False, 0.0), (1, 2, True, 0.0), (2, 1, True, 0.5), (2, 2, False, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("kind", LAYERS)
def test_first_and_second_derivatives(kind, L, D, packed, dropout):
    torch.manual_seed(0)
    options = dict(bidirectional=D == 2, dropout=dropout, dtype=torch.float64)
    module = getattr(drop_in, kind)(1, 2, L, **options)
    rows = [torch.randn(t, 1, dtype=torch.float64) for t in (1, 3)]
    sequence = pack_sequence(rows, enforce_sorted=False) if packed else None
    x = sequence.data.clone() if packed else torch.randn(2, 2, 1, dtype=torch.float64)
    state = [torch.randn(L * D, 2, 2, dtype=torch.float64) for _ in range(1 + (kind == "LSTM"))]
    weights = [p.detach().clone() for p in module.parameters()]
    given = [t.requires_grad_() for t in (x, *state, *weights)]
    n = len(state)

    def function(x, *others):
        return functional(module, x, others[n:], others[:n], sequence)

    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


def test_a_third_derivative_and_a_gradient_penalty():
    """Second derivatives can be differentiated again; each agrees with torch.nn's."""
    ours, theirs = pair("LSTM", 3, 4, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (ours, theirs):
        (first,) = torch.autograd.grad(module(x)[0].pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
        third = torch.autograd.grad(second.pow(2).sum(), [x, *module.parameters()])
        found.append((first, second, *third))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_a_weight_used_twice_has_one_gradient_for_each_use():
    ours, theirs = pair("GRU", 4, 4, num_layers=2, dtype=torch.float64)
    for module in (ours, theirs):
        module.weight_ih_l1 = module.weight_ih_l0
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (ours, theirs):
        (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        found.append([dx, *torch.autograd.grad(dx.pow(2).sum(), list(module.parameters()))])
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_what_needs_no_gradient_gets_none_and_costs_nothing(monkeypatch):
    module = drop_in.LSTM(3, 5, num_layers=3)
    layers = []
    original = bridge._pack
    monkeypatch.setattr(
        bridge, "_pack", lambda *args: layers.append((args[4], args[6])) or original(*args)
    )
    for p in module.parameters():
        p.requires_grad_(False)
    x = torch.randn(4, 2, 3)
    y, _ = module(x)
    assert not y.requires_grad and y.grad_fn is None
    module.weight_hh_l1.requires_grad_()
    layers.clear()
    module(x)[0].sum().backward()
    back = [layer for kind, layer in layers if kind == bridge.BACKWARD]
    assert back == [2, 1]  # nothing below the lowest layer of which something is wanted
    assert module.weight_hh_l1.grad is not None
    others = [p for name, p in module.named_parameters() if name != "weight_hh_l1"]
    assert all(p.grad is None for p in others)


def test_retain_graph_hooks_and_repeated_backward():
    module = drop_in.GRU(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    y, _ = module(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second) and seen == ["forward", "backward", "backward"]
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_parameters_changed_in_place():
    """By an optimiser they take effect at once; between forward and backward it is an error."""
    ours, theirs = pair("LSTM", 3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (ours, theirs):
        adam = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(5):
            adam.zero_grad()
            module(x)[0].pow(2).sum().backward()
            adam.step()
    assert torch.allclose(ours(x)[0], theirs(x)[0], rtol=1e-9, atol=1e-12)
    y, _ = ours(x)
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_follows_pytorchs_seed_and_mode():
    module = drop_in.LSTM(3, 64, num_layers=2, dropout=0.5)
    x = torch.randn(6, 4, 3)
    torch.manual_seed(1)
    a, b = module(x)[0], module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], a) and not torch.equal(a, b)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    mean = torch.stack([module.train()(x)[0] for _ in range(200)]).mean(0)
    assert (mean - module.eval()(x)[0]).abs().mean() < 0.02


@pytest.mark.parametrize("kind", LAYERS)
def test_the_same_bits_for_any_number_of_threads(kind):
    module = getattr(drop_in, kind)(16, 32, num_layers=2, bidirectional=True)
    x = torch.randn(20, 8, 16, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            module.zero_grad()
            y, _ = module(x)
            y.sum().backward()
            found.append([y.detach(), *[p.grad.clone() for p in module.parameters()]])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits("result", a.numpy(), b.numpy())


# ------------------------------------------------------------------------------ what wraps modules


@pytest.fixture
def compiled():
    """torch.compile without code generation, and without what other tests have compiled."""
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def graph_inputs(kind, form):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, generator=generator)
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False)
    return x, states_of(kind, (4, 3, 7), torch.float32, generator)


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_in_one_graph(kind, form, compiled):
    module = getattr(drop_in, kind)(5, 7, num_layers=2, bidirectional=True)
    for hx in (True, False):
        x, state = graph_inputs(kind, form)
        arguments = (x, state) if hx else (x,)
        found = []
        for call in (module, compiled(module)):
            module.zero_grad()
            given = leaves(arguments, torch.float32)
            results = flat(call(*given))
            sum(r.sum() for r in results).backward()
            grads = [t.grad for t in flat(given)] + [p.grad for p in module.parameters()]
            found.append(results + grads)
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def test_compiled_with_other_lengths_and_in_training_mode(compiled):
    module = drop_in.LSTM(5, 7, num_layers=2, dropout=0.5, batch_first=True)
    call = compiled(module)
    for T in (3, 5, 9):
        x = torch.randn(2, T, 5)
        torch.manual_seed(0)
        want = module(x)[0]
        torch.manual_seed(0)
        assert torch.equal(call(x)[0], want)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile's code needs g++")
def test_compiled_as_users_do():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 5), drop_in.GRU(5, 7))
    x = torch.randn(4, 3, 5)
    want = model(x)[0]
    # Without its cache on the disk, which knows an operator by its name alone.
    config_of_compiler = torch._inductor.config.patch(force_disable_caches=True)
    with warnings.catch_warnings(), config_of_compiler:
        warnings.simplefilter("ignore")  # PyTorch's own, of its compiler
        got = torch.compile(model, fullgraph=True)(x)[0]
        got.sum().backward()
    assert torch.allclose(got, want, atol=1e-6) and model[1].weight_hh_l0.grad.abs().sum() > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", LAYERS)
def test_operators_keep_their_promises(kind):
    """`opcheck`: schema, fake kernels, autograd registration, and traces with dynamic shapes."""
    module = getattr(drop_in, kind)(3, 5)
    weights, state = list(module.parameters()), torch.randn(1, 2, 5, requires_grad=True)
    c = state if kind == "LSTM" else None
    x = torch.randn(4, 2, 3, requires_grad=True)
    words = module._cell, 1, 1, False, 0.0
    torch.library.opcheck(ops.forward_op, (x, None, state, c, None, weights, *words, True))
    plain = [w.detach() for w in weights]
    no_tape = x.detach(), None, None, None, None, plain, *words, False
    torch.library.opcheck(ops.forward_op, no_tape)
    y, h_n, _, tape = ops.forward_op(x, None, state, c, None, weights, *words, True)
    needed = [True, True, c is not None, *[True] * len(weights)]
    given = torch.randn_like(y), torch.randn_like(h_n), None, x, None, state, c, None
    torch.library.opcheck(ops.backward_op, (*given, tape.detach(), weights, *words, needed))


@pytest.mark.parametrize("kind", LAYERS)
def test_exported_with_dynamic_shapes(kind):
    module = getattr(drop_in, kind)(5, 7, num_layers=2)
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    program = torch.export.export(module, (torch.randn(4, 3, 5),), dynamic_shapes={"input": sizes})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(9, 2, 5)
    assert torch.equal(torch.export.load(file).module()(x)[0], module(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_pickles(kind):
    module = getattr(drop_in, kind)(5, 7)
    x = torch.randn(4, 3, 5)
    want = flat(module(x))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert all(map(torch.equal, flat(other(x)), want))
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert all(map(torch.equal, flat(module(x)), want))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_transforms_of_torch_func():
    """grad, jvp, vmap, and forward-mode derivatives: by a composition of PyTorch's operations."""
    ours, theirs = pair("LSTM", 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(named, module):
        return torch.func.functional_call(module, named, (x,))[0].pow(2).sum()

    got = torch.func.grad(lambda named: loss(named, ours))(parameters)
    loss(dict(theirs.named_parameters()), theirs).backward()
    for name, p in theirs.named_parameters():
        assert torch.allclose(got[name], p.grad)
    tangent = torch.randn_like(x)
    _, along = torch.func.jvp(lambda x: ours(x)[0], (x,), (tangent,))
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(x, tangent))[0]
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, along)
    small = 1e-6
    difference = (ours(x + small * tangent)[0] - ours(x - small * tangent)[0]) / (2 * small)
    assert torch.allclose(along, difference, atol=1e-7)
    batched = torch.func.vmap(lambda x: ours(x)[0], in_dims=1, out_dims=1)(x)
    assert torch.allclose(batched, ours(x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_transforms_around_a_backward_pass_alone():
    ours, theirs = pair("LSTM", 3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    batch = torch.randn(4, 3, 2, 4, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        y = module(x)[0]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(batch[0], batch[1])
            (dx,) = torch.autograd.grad(y, x, dual, retain_graph=True)
            tangent = forward_ad.unpack_dual(dx).tangent
        each = torch.vmap(lambda g, y=y: torch.autograd.grad(y, x, g, retain_graph=True)[0])(batch)
        found.append((tangent, each))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_attributes_that_are_assigned_later():
    """What torch.nn reads at each call, we do, too."""
    lstm = drop_in.LSTM(3, 4, num_layers=2, dropout=0.5)
    for bad in (1.5, -0.5, float("nan")):
        lstm.dropout = bad
        with pytest.raises((ValueError, RuntimeError), match="dropout"):
            lstm(torch.ones(5, 2, 3))
    lstm.dropout = 0.5
    with torch.device("meta"):  # the default device of what is made, not of what is there
        assert lstm(torch.ones(5, 2, 3, device="cpu"))[0].device.type == "cpu"
    lstm.batch_first = True
    assert lstm(torch.ones(2, 5, 3))[1][0].shape == (2, 2, 4)


def test_parameters_swapped_by_a_signals_handler():
    """A handler that changes dtypes in the midst of calls: each result is right, or an error."""
    code = (
        "import signal, time, torch, rnnfast.torch\n"
        "m, x = rnnfast.torch.LSTM(64, 128, 4), torch.randn(30, 16, 64)\n"
        "want = m(x)[0].detach()\n"
        "started = time.monotonic(); m(x); lasts = time.monotonic() - started\n"
        "signal.signal(signal.SIGALRM, lambda *_: m.double())\n"
        "ended, right, wrong = time.monotonic() + 5, 0, 0\n"
        "while time.monotonic() < ended:\n"
        "    at = (right + wrong) % 20 / 19  # from before the kernels run until the call is over\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.0001 * (2e4 * lasts) ** at)\n"
        "    try:\n"
        "        with torch.no_grad():\n"
        "            y = m(x)[0]\n"
        "        assert torch.equal(y, want)\n"
        "        right += 1\n"
        "    except (RuntimeError, ValueError):\n"
        "        wrong += 1\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "    m.float()\n"
        "assert right, (right, wrong)\n"
        "print('whole')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.stdout == "whole\n", (run.returncode, run.stderr)


def test_functional_call_parametrisation_and_checkpoint():
    module = drop_in.LSTM(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    other = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    got = torch.func.functional_call(module, other, (x,))[0]
    twin = copy.deepcopy(module)
    twin.load_state_dict(other)
    assert torch.equal(got, twin(x)[0])

    nn.utils.parametrizations.weight_norm(twin, "weight_hh_l0")
    assert torch.allclose(twin(x)[0], got, atol=1e-5)
    twin(x)[0].sum().backward()
    assert twin.parametrizations.weight_hh_l0.original1.grad is not None

    (want,) = torch.autograd.grad(module(x)[0].sum(), x)
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=reentrant)
        x.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, want)


def test_autocast_computes_in_the_weights_dtype(compiled):
    module = drop_in.LSTM(5, 7)
    x = torch.randn(4, 3, 5).bfloat16()
    want = module(x.float())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (module, compiled(module)):
            y = call(x)[0]
            assert y.dtype == torch.float32 and torch.equal(y, want)
        state = tuple(torch.zeros(1, 3, 7, dtype=torch.bfloat16) for _ in range(2))
        assert torch.equal(module(x, state)[0], want)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = drop_in.LSTM(5, 7, num_layers=2, device="meta")
    y, (h_n, c_n) = module(torch.randn(4, 3, 5, device="meta"))
    assert y.shape == (4, 3, 7) and y.is_meta and h_n.shape == c_n.shape == (2, 3, 7)
    with FakeTensorMode():
        y, _ = drop_in.GRU(5, 7)(torch.randn(4, 3, 5))
        assert y.shape == (4, 3, 7) and type(y).__name__ == "FakeTensor"


def test_inference_mode_and_traces():
    module = drop_in.LSTM(5, 7)
    x = torch.randn(4, 3, 5)
    want = module(x)[0]
    with torch.inference_mode():
        y, _ = module(x)
        assert torch.equal(y, want) and y.is_inference()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that become constants, and of torch.jit's age
        traced = torch.jit.trace(module, (x,), check_trace=False)
        assert torch.equal(traced(x)[0], want)


# --------------------------------------------------------------------------------------- threads


def test_threads_follow_pytorch_unless_rnnfast_was_told(monkeypatch):
    monkeypatch.setattr(config, "told", False)
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert threads.call_threads() == n
        rnnfast.set_num_threads(3)
        assert config.told and threads.call_threads() == 3
    finally:
        torch.set_num_threads(before)
        rnnfast.set_num_threads(config.threads if config.threads != 3 else before)


WORKERS = """
import torch, rnnfast.torch
torch.set_num_threads(2)
lstm = rnnfast.torch.LSTM(64, 96)
x = torch.randn(30, 16, 64)
want = lstm(x)[0].detach()

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        with torch.no_grad():
            return lstm(x)[0], torch.get_num_threads()

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(
        Data(), num_workers=2, multiprocessing_context="fork", batch_size=None)
    for y, threads in loader:
        assert torch.equal(y, want) and threads == 1, threads
    print("equal")
"""


FORKS = """
import os, signal, torch, rnnfast.torch
torch.set_num_threads(2)
lstm, x, pids = rnnfast.torch.LSTM(128, 128), torch.randn(400, 32, 128), []
with torch.no_grad():
    want = lstm(x)[0]
    signal.signal(signal.SIGALRM, lambda *_: pids.append(os.fork()))
    for _ in range(100):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            y = lstm(x)[0]
        except OSError:  # a call that forked in its midst has no result in the child
            y = lstm(x)[0]
        signal.setitimer(signal.ITIMER_REAL, 0)
        # By NumPy: PyTorch's own operations hang in a child that forked after threads were used.
        right = (y.numpy() == want.numpy()).all()
        if pids and pids[-1] == 0:
            os._exit(0 if right else 1)
        assert right
        if pids:
            assert os.waitpid(pids[-1], 0)[1] == 0
            break
print("equal")
"""


def test_forked_in_the_midst_of_a_call():
    """By a signal's handler; the child has none of the OpenMP threads that the call ran on."""
    run = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are found by /proc")
def test_kernels_run_on_pytorchs_threads():
    """No thread of our own is made beside them."""
    code = (
        "import os, torch, rnnfast.torch\n"
        "torch.set_num_threads(2)\n"
        "torch.randn(2000, 2000) @ torch.randn(2000, 2000)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "rnnfast.torch.LSTM(256, 256)(torch.randn(50, 32, 256))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    for own, new in (("", "0\n"), ("1", "1\n")):
        environment = {**os.environ, "RNNFAST_OWN_THREADS": own}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120,
            env=environment,
        )  # fmt: skip
        assert run.stdout == new, run.stderr


def test_in_workers_of_a_data_loader(tmp_path):
    """Forked after calls with two threads; each worker computes with the one that PyTorch gives."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    run = subprocess.run(
        [sys.executable, script], capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.stdout == "equal\n", run.stderr


# ---------------------------------------------------------------------------------------- errors

# Arguments that torch.nn refuses, and we in its very words.
CONSTRUCTORS = (
    ((3, 0), {}), ((0, 3), {}), ((3.5, 4), {}), ((3, 4), {"num_layers": 0}),
    ((3, 4), {"dropout": 2}), ((3, 4), {"dropout": True}), ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": 1}), ((3, 4), {"proj_size": -1}), ((3, 4), {"proj_size": 9}),
    ((3, 4), {"foo": 3}), ((3, 4), {"nonlinearity": "x"}), ((3, 4), {"dtype": torch.int64}),
)  # fmt: skip


def raised(call):
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(("sizes", "options"), CONSTRUCTORS)
@pytest.mark.parametrize("kind", LAYERS)
def test_constructors_refuse_as_torch_nn(kind, sizes, options):
    ours, theirs = (
        raised(lambda module=module: getattr(module, kind)(*sizes, **options))
        for module in (drop_in, nn)
    )
    assert ours == theirs


def test_dropout_of_one_layer_warns_as_torch_nn():
    for module in (drop_in, nn):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            module.LSTM(3, 4, dropout=0.5)


def test_projections(compiled):
    """Compiled, exported, differentiated twice and transformed; values are in the random runs."""
    ours, theirs = pair("LSTM", 3, 5, dtype=torch.float64, num_layers=2, proj_size=2)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [len(w) for w in ours.all_weights] == [5, 5]
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ours(x)[0], (x,)) and gradgradcheck(lambda x: ours(x)[0], (x,))
    batched = torch.func.vmap(lambda x: ours(x)[0], in_dims=1, out_dims=1)(x)
    assert torch.allclose(batched, theirs(x)[0])
    (dx,) = torch.autograd.grad(compiled(ours)(x)[0].sum(), x)
    assert torch.allclose(dx, torch.autograd.grad(theirs(x)[0].sum(), x)[0])
    meta = drop_in.LSTM(3, 5, proj_size=2, device="meta")
    y, (h_n, c_n) = meta(torch.ones(4, 2, 3, device="meta"))
    assert (y.shape, h_n.shape, c_n.shape) == ((4, 2, 2), (1, 2, 2), (1, 2, 5))
    torch.library.opcheck(
        torch.ops.rnnfast.forward.default,
        (x, None, None, None, None, list(ours.parameters()), "lstm", 2, 1, False, 0.0, True),
    )
    with pytest.raises(ValueError, match=r"proj_size has to be smaller than hidden_size"):
        drop_in.LSTM(3, 4, proj_size=4)
    ours.weight_hr_l1 = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^weight_hr_l1: got .* a torch.float64 .* \(2, 5\)"):
        ours(x)
    weights = list(theirs.parameters())
    call = torch.ops.rnnfast.forward
    for bad in (weights[:-1], [*weights[:4], weights[4].T.contiguous(), *weights[5:]]):
        with pytest.raises(bridge.Misfit):
            call(x, None, None, None, None, bad, "lstm", 2, 1, False, 0.0, False)
    packed = pack_sequence([torch.randn(k, 3).double() for k in (4, 7, 1)], enforce_sorted=False)
    for layers in (1, 2):  # of another number the compiler makes a symbol
        module = drop_in.LSTM(3, 5, layers, proj_size=2, dtype=torch.float64)
        with torch.no_grad():
            got = torch.compile(module, backend="aot_eager", dynamic=layers == 2)(packed)[0].data
            assert torch.allclose(got, module(packed)[0].data)
    ones = torch.ones
    for cell in ("lstm_peephole", "gru_reset_before", "mlp"):  # PyTorch has no such
        with pytest.raises(bridge.Misfit, match=r"^cell: got"):
            call(ones(2, 1, 3), None, None, None, None, [ones(20, 3), ones(20, 5)], cell, 1, 1,
                 False, 0.0, True)  # fmt: skip
    with pytest.raises(bridge.Misfit, match=r"^weights: got 10 of 2 layers"):
        call(x, None, None, None, None, weights, "gru", 2, 1, False, 0.0, False)


def wrong_calls(kind):
    """Calls that torch.nn refuses, by name."""

    def state(*shape):
        return states_of(kind, shape, torch.float32, None)

    x, ones = torch.randn(5, 2, 3), torch.ones
    yield "input_size", (ones(5, 2, 4),)
    yield "unbatched input_size", (ones(5, 4),)
    yield "rank 1", (ones(5),)
    yield "rank 4", (ones(2, 2, 2, 3),)
    yield "float64", (x.double(),)
    yield "integers", (x.long(),)
    yield "bfloat16", (x.bfloat16(),)
    yield "complex", (x.to(torch.complex64),)
    yield "layers of hx", (x, state(1, 2, 4))
    yield "batch of hx", (x, state(2, 3, 4))
    yield "hidden_size of hx", (x, state(2, 2, 5))
    yield "rank of hx", (x, state(2, 4))
    yield "hx batched, input not", (ones(5, 3), state(2, 1, 4))
    yield "hx of a str", (x, "x")
    yield "hx of a number", (x, 3)
    yield "an array", (x.numpy(),)
    yield "nothing", (None,)
    yield "packed input_size", (pack_sequence([ones(3, 4), ones(2, 4)]),)
    if kind == "LSTM":
        yield "one state", (x, ones(2, 2, 4))
        yield "one state in a tuple", (x, (ones(2, 2, 4),))
    else:
        yield "two states", (x, (ones(2, 2, 4), ones(2, 2, 4)))


@pytest.mark.parametrize("kind", LAYERS)
def test_calls_refuse_as_torch_nn(kind):
    ours, theirs = (getattr(module, kind)(3, 4, 2) for module in (drop_in, nn))
    for name, arguments in wrong_calls(kind):
        got, want = (raised(lambda m=m, a=arguments: m(*a)) for m in (ours, theirs))
        if name == "one state" and want[0] is not got[0]:
            continue  # torch.nn cuts a tensor into two and stumbles later
        assert got[0] is want[0], (name, got, want)
        if not name.startswith(("packed", "one state")):  # whose words come from C++
            assert got[1] == want[1], name


OUR_REFUSALS = {
    "sparse": (lambda x: x.to_sparse(), r"input: got torch.float32 sparse_coo tensor of shape"),
    "meta": (lambda x: x.to("meta"), r"weight_ih_l0: got .* on cpu; needs torch.float32 on meta"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1]]), r"input: got .* needs a dense"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", OUR_REFUSALS)
def test_calls_that_we_refuse_alone(what):
    change, message = OUR_REFUSALS[what]
    with pytest.raises((bridge.Misfit, RuntimeError), match=message):
        drop_in.LSTM(3, 4)(change(torch.ones(5, 2, 3)))


def test_packed_inputs_are_blamed_as_others_are():
    """torch.nn looks at no PackedSequence, and stumbles in a product."""
    lstm = drop_in.LSTM(3, 4)
    with pytest.raises(RuntimeError, match=r"^input.size\(-1\) must be equal to input_size"):
        lstm(pack_sequence([torch.ones(3, 5), torch.ones(2, 5)]))
    with pytest.raises(ValueError, match=r"^RNN input dtype \(torch.float64\) does not match"):
        lstm(pack_sequence([torch.ones(3, 3).double()]))


def test_weights_that_do_not_fit_are_refused():
    """Parameters can be replaced by anything; kernels would read beyond their end."""
    for name, bad, got in (
        ("weight_hh_l0", torch.randn(3, 3), "torch.float32 tensor of shape (3, 3) on cpu"),
        ("weight_ih_l0", torch.randn(16, 2), "torch.float32 tensor of shape (16, 2) on cpu"),
        ("bias_ih_l0", torch.randn(15), "torch.float32 tensor of shape (15,) on cpu"),
        ("bias_hh_l0", torch.randn(16).double(), "torch.float64 tensor of shape (16,) on cpu"),
        ("weight_ih_l0", torch.randn(16, 3).bfloat16(), "torch.bfloat16 tensor of shape (16, 3)"),
        ("weight_hh_l0", torch.eye(16, 4).to_sparse(), "torch.float32 sparse_coo tensor of shape"),
        ("weight_hh_l0", None, "None"),
    ):
        lstm = drop_in.LSTM(3, 4)
        shape = tuple(getattr(lstm, name).shape)
        setattr(lstm, name, None if bad is None else nn.Parameter(bad))
        with pytest.raises(ValueError) as caught:
            lstm(torch.ones(5, 2, 3))
        assert str(caught.value).startswith(f"{name}: got {got}"), caught.value
        needs = "a dense tensor" if "sparse" in got else f"a torch.float32 tensor of shape {shape}"
        assert f"; needs {needs}" in str(caught.value)
    for name, value in (("num_layers", 2), ("bidirectional", True), ("hidden_size", 5)):
        lstm = drop_in.LSTM(3, 4)
        setattr(lstm, name, value)  # it now wants other parameters than it has
        with pytest.raises(RuntimeError, match=r"^input.size\(-1\) must be equal"):
            lstm(torch.ones(5, 2, 2))
        if name != "hidden_size":
            with pytest.raises(bridge.Misfit, match=r"^weight.*_l.*: got .*; needs"):
                lstm(torch.ones(5, 2, 3))
    lstm = drop_in.LSTM(3, 4)
    for name in list(lstm._parameters):
        setattr(lstm, name, None)
    with pytest.raises((RuntimeError, ValueError)):
        lstm(torch.ones(5, 2, 3))
    half = drop_in.LSTM(3, 4).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^input: got torch.bfloat16 .* needs torch.float32 or"):
        half(torch.ones(5, 2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("sizes", [[2, 3], [2, 2], [9, -4], [5, 0], [], [1, 1, 1, 1, 2]])
def test_batch_sizes_that_no_packed_sequence_has_are_refused(sizes):
    """As in CVE-2025-2998: PackedSequence itself takes any."""
    packed = PackedSequence(torch.ones(5, 3), torch.tensor(sizes, dtype=torch.int64))
    for module in (drop_in.LSTM(3, 4), drop_in.GRU(3, 4, num_layers=2, bidirectional=True)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            module(packed)


def test_operators_called_with_nonsense_raise():
    """They are reachable by name, so they look at all that they are given."""
    lstm = drop_in.LSTM(3, 4)
    weights, x = list(lstm.parameters()), torch.ones(5, 2, 3)
    words = "lstm", 1, 1, False, 0.0
    call = torch.ops.rnnfast.forward
    with torch.no_grad():
        y, _, _, tape = call(x, None, None, None, None, weights, *words, True)
        for bad in (
            (x, None, None, None, None, weights[:3], *words, True),
            (x, None, None, None, None, [], *words, True),
            (x, None, None, None, None, weights, "lstm", 0, 1, False, 0.0, True),
            (x, None, None, None, None, weights, "lstm", 1, 3, False, 0.0, True),
            (x, None, None, None, None, weights, "gru", 1, 1, False, 0.0, True),
            (x, None, torch.ones(1, 1, 4), None, None, weights, *words, True),
            (x, None, None, torch.ones(4), None, weights, *words, True),
            (x[0], torch.tensor([9]), None, None, None, weights, *words, True),
        ):
            with pytest.raises((ValueError, RuntimeError)):
                call(*bad)
        back = torch.ops.rnnfast.backward
        needed = [True, False, False, True, True, True, True]
        given = None, None, None, x, None, None, None, None
        assert len(back(y, *given[1:], tape, weights, *words, needed)) == 5
        for bad in (
            (y[1:], *given[1:], tape, weights, *words, needed),
            (y, *given[1:], tape[1:], weights, *words, needed),
            (y, *given[1:], tape, weights, *words, needed[1:]),
            (y, torch.ones(1, 3, 4), *given[2:], tape, weights, *words, needed),
        ):
            with pytest.raises((ValueError, RuntimeError)):
                back(*bad)


def test_empty_sequences_and_batches():
    """T = 0, which torch.nn refuses, gives an empty output and the initial states."""
    module = drop_in.LSTM(3, 4, num_layers=2)
    state = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    y, (h_n, c_n) = module(torch.ones(0, 2, 3), state)
    assert y.shape == (0, 2, 4)
    assert torch.equal(h_n, state[0]) and torch.equal(c_n, state[1])
    y, _ = module(torch.ones(5, 0, 3, requires_grad=True))
    y.sum().backward()
    assert y.shape == (5, 0, 4) and not module.weight_ih_l0.grad.any()


# --------------------------------------------------------------------------------------- convert


class Model(nn.Module):
    """Recurrent modules of all kinds, in odd places."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, dropout=0.1, batch_first=True)
        self.inner = nn.ModuleList([nn.GRU(16, 16), nn.GRUCell(16, 16)])
        self.again = self.lstm
        self.projected = nn.LSTM(4, 8, proj_size=3)
        self.half = nn.GRU(3, 4, dtype=torch.bfloat16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
        self.own = type("Own", (nn.LSTM,), {})(3, 4)


def test_convert_swaps_in_place_and_tells():
    model = Model()
    names, parameters = list(model.state_dict()), list(model.parameters())
    calls = []
    model.lstm.register_forward_hook(lambda *_: calls.append(1))
    model.lstm.eval()
    x = torch.randn(2, 3, 8)
    want = model.lstm(x)[0]
    with pytest.warns(UserWarning, match=r"convert left as they are: half \(weight_ih_l0 is of"):
        done = drop_in.convert(model)
    assert done.model is model
    assert list(done.swapped) == ["lstm", "inner.0", "again", "projected"]
    assert list(done.left) == ["inner.1", "half", "normed", "own"]
    assert "swapped inner.0: GRU(16, 16)" in str(done)
    assert "left inner.1: a cell: of a single step, PyTorch's own is as fast" in str(done)
    assert "left half: weight_ih_l0 is of torch.bfloat16" in str(done)
    assert "left own: a subclass, Own" in str(done)
    assert type(model.lstm) is drop_in.LSTM and model.again is model.lstm
    assert not model.lstm.training and model.inner.training
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.allclose(model.lstm(x)[0], want, atol=1e-5) and len(calls) == 2
    copy.deepcopy(model)
    with pytest.warns(UserWarning):
        assert not drop_in.convert(model).swapped  # there is nothing left to swap


def test_convert_of_a_module_itself_and_of_what_is_none():
    gru = nn.GRU(3, 4)
    done = drop_in.convert(gru)
    assert type(done.model) is drop_in.GRU and done.model.weight_hh_l0 is gru.weight_hh_l0
    assert str(done) == "swapped the model itself: GRU(3, 4); the new one is .model of this result"
    assert str(drop_in.convert(nn.Linear(2, 2))) == "no recurrent module found"
    with pytest.raises(TypeError, match=r"model: got str; needs a torch.nn.Module"):
        drop_in.convert("model")


@pytest.mark.parametrize("kind", LAYERS)
def test_converted_modules_go_on_training(kind):
    """With the optimiser that was there before."""
    theirs = getattr(nn, kind)(3, 4, dtype=torch.float64)
    model = nn.ModuleList([copy.deepcopy(theirs)])
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (theirs, model)]
    drop_in.convert(model)
    x = torch.randn(2, 3, dtype=torch.float64).expand(5, 2, 3)
    for _ in range(3):
        for module, optimizer in zip((theirs, model[0]), optimizers, strict=True):
            optimizer.zero_grad()
            flat(module(x))[0].pow(2).sum().backward()
            optimizer.step()
    for p, q in zip(theirs.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
