"""rnnfast.torch.Wrapped: every option of the modules through autograd, to the bit as in NumPy; what
PyTorch does with a module; and loops of PyTorch's own operations beside it.

Needs PyTorch, and is skipped without.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import test_layer_norm
from cases import CELLS, as_tuple, make_module, make_weights
from test_options import ROWS, H, I, Run
from tolerances import assert_close, assert_same_bits

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad, gradcheck  # noqa: E402
from torch.func import functional_call  # noqa: E402

import rnnfast  # noqa: E402
from rnnfast import Clamp  # noqa: E402
from rnnfast.torch import Wrapped  # noqa: E402

T, B = 6, 3
EVERYTHING = dict(
    num_layers=2, bidirectional=True, dropout=0.2, recurrent_dropout=0.2, drop_connect=0.2,
    merge="sum", learn_initial=True, cell_clip=2.0, peephole=True,
)  # fmt: skip


def random(*shape, seed=0, dtype=torch.float64, grad=False):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return tensor.requires_grad_(grad)


def flat(value):
    """The tensors or arrays of a result, in order."""
    if isinstance(value, (tuple, list)):
        return [one for item in value for one in flat(item)]
    return [] if value is None else [value]


def lstm(seed=0, **options):
    return Wrapped(rnnfast.LSTM(I, H, dtype=np.float64, seed=seed, **options))


def gradients(module, *arguments, seed=5, **call):
    """All results, and all gradients of a loss in which each of their numbers has a weight."""
    module.zero_grad()
    results = flat(module(*arguments, **call))
    weights = [random(*one.shape, seed=seed + i) for i, one in enumerate(results)]
    torch.autograd.backward(results, weights)
    return results, [parameter.grad for parameter in module.parameters()]


# ------------------------------------------------------------------------------------ the options


def compare(kind, *options, stated):
    """A module with these options, through the wrapper and without: all numbers there are."""
    run = Run(kind, *options)
    context = f"{kind}: {', '.join(one.name for one in options)}; {stated=}"
    module, call = run.module, dict(run.call)
    limits = {f"grad_{name}": value for name, value in run.back.items() if name != "norms"}
    tape, drop = call.pop("tape", "full"), call.pop("drop", True)
    wrapped = Wrapped(copy.deepcopy(module), tape=tape, **limits).train(drop)
    x = torch.from_numpy(run.x).requires_grad_()
    pair, state, given = kind == "LSTM", None, []
    last = module(run.x, **call)[1]
    if stated:
        given = [random(*s.shape, seed=i, grad=True) for i, s in enumerate(as_tuple(last))]
        state = tuple(given) if pair else given[0]
    theirs = dict(call)
    if run.clamp is not None:
        values = torch.tensor(run.clamp.values, requires_grad=True)
        theirs["clamp"] = Clamp(values, units=run.clamp.units)
    results, parameters = gradients(wrapped, x, state, **theirs)

    arrays = tuple(one.detach().numpy() for one in given)
    arrays = None if not stated else arrays if pair else arrays[0]
    y, last, kept, *steps = module.forward_train(run.x, arrays, tape=tape, drop=drop, **call)
    found = flat([y, last, steps])
    for i, (got, want) in enumerate(zip(results, found, strict=True)):
        assert_same_bits(f"result {i}", got.detach().numpy(), want, context=context)
    dy, *rest = (random(*one.shape, seed=5 + i).numpy() for i, one in enumerate(found))
    dlast, rest = (tuple(rest[:2]), rest[2:]) if pair else (rest[0], rest[1:])
    dstates = (*rest, None)[:2] if rest else None
    back = {name: value for name, value in run.back.items() if name != "norms"}
    dx, dstate, *extra = module.backward(kept, dy, dlast, dstates=dstates, **back)
    assert_same_bits("dx", x.grad.numpy(), dx, context=context)
    for one, want in zip(given, as_tuple(dstate), strict=False):
        assert_same_bits("dstate", one.grad.numpy(), want, context=context)
    names = module.grads.items()
    for (name, want), got in zip(names, parameters, strict=True):
        assert_same_bits(name, got.numpy(), want, context=context)
    if run.clamp is not None:
        assert_same_bits("dvalues", values.grad.numpy(), extra[0].clamps[0], context=context)
    assert wrapped.layers.dropout_calls == module.dropout_calls


CALLS = {kind: [one for one in rows if not one.use] for kind, rows in ROWS.items()}


@pytest.mark.parametrize(("kind", "a"), [(k, a) for k in CALLS for a in range(len(CALLS[k]))])
def test_each_two_options(kind, a):
    """All that a module's call can be asked for; pairs that it refuses, it refuses here."""
    option = CALLS[kind][a]
    compare(kind, option, stated=True)
    for other in CALLS[kind][a:]:
        try:
            Run(kind, option, other).results()
        except ValueError:
            with pytest.raises(ValueError, match=r"got .*; needs"):
                compare(kind, option, other, stated=False)
        else:
            compare(kind, option, other, stated=False)


def test_frozen_layers_are_refused():
    """They would compute with parameters of which no optimiser's step is seen."""
    module = lstm()
    module.layers.freeze()
    with pytest.raises(ValueError, match="layers: got a frozen module; needs unfreeze"):
        module(random(T, B, I))
    assert copy.deepcopy(module).layers.flat.flags.writeable
    module.layers.unfreeze()
    module(random(T, B, I))


def test_a_module_that_is_wrapped_twice_has_the_same_parameters():
    """So that what one changes between the other's forward and backward is seen."""
    one = lstm()
    two = Wrapped(one.layers)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert a is b
    y, _ = two(random(T, B, I))
    one(random(T, B, I))[0].sum().backward()
    torch.optim.SGD(one.parameters(), lr=0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    copied = copy.deepcopy(one)
    assert Wrapped(copied.layers).weight_hh_l0 is copied.weight_hh_l0 is not one.weight_hh_l0


def test_eval_drops_nothing_and_has_gradients():
    """Those of inference: a module without what drops has the same, to the bit."""
    module = lstm(**EVERYTHING).eval()
    plain = Wrapped(rnnfast.LSTM(I, H, dtype=np.float64, **{
        name: value for name, value in EVERYTHING.items() if "drop" not in name
    }))  # fmt: skip
    plain.load_state_dict(module.state_dict())
    x = random(T, B, I)
    for got, want in zip(flat(gradients(module, x)), flat(gradients(plain, x)), strict=True):
        assert torch.equal(got, want)
    assert module.layers.dropout_calls == 0
    assert not torch.equal(module.train()(x)[0], plain(x)[0])


def test_zoneout_is_expected_in_eval_without_gradients():
    module = lstm(zoneout=0.3).eval()
    x = random(T, B, I)
    y, _ = module(x)  # as somebody writes who has no use for gradients, and says nothing of them
    assert_same_bits("y", y.detach().numpy(), module.layers(x.numpy())[0])
    with pytest.raises(ValueError, match="zoneout: got a backward pass in eval mode; needs train"):
        y.sum().backward()


def test_without_gradients_training_drops_all_the_same():
    module, x = lstm(recurrent_dropout=0.5), random(T, B, I)
    with torch.no_grad():
        y, _ = module(x)
        module.layers.dropout_calls = 0
        assert torch.equal(module(x)[0], y) and not y.requires_grad
        assert not torch.equal(module(x)[0], y) and module.layers.dropout_calls == 2
        module.eval()
        assert torch.equal(module(x)[0], module(x)[0]) and module.layers.dropout_calls == 2
    frozen = lstm().requires_grad_(False)
    assert not frozen(x)[0].requires_grad and frozen.layers.dropout_calls == 0


# --------------------------------------------------------------------------------- outside truths


def loop(cell, x, states, p):
    """An LSTM with peepholes, coupled gates or both, step by step."""
    peephole, coupled, ys = "peephole" in cell, "coupled" in cell, []
    h, c = states
    for x_t in x:
        z = x_t @ p["weight_ih_l0"].T + p["bias_ih_l0"] + h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
        if coupled:
            zi, zg, zo = z.chunk(3, dim=1)
        else:
            zi, zf, zg, zo = z.chunk(4, dim=1)
        w = p["weight_peephole_l0"].chunk(2 if coupled else 3) if peephole else (0, 0, 0)
        i = torch.sigmoid(zi + w[0] * c)
        f = 1 - i if coupled else torch.sigmoid(zf + w[1] * c)
        c = f * c + i * torch.tanh(zg)
        h = torch.sigmoid(zo + w[-1] * c) * torch.tanh(c)
        ys.append(h)
    return torch.stack(ys), (h, c)


LOOPED = {
    "lstm_peephole": loop, "lstm_coupled": loop, "lstm_coupled_peephole": loop,
    "lstm_norm": None, "lstm_norm_cell": None, "gru_norm": None, "rnn_tanh_norm": None,
}  # fmt: skip


@pytest.mark.parametrize("cell", LOOPED)
def test_a_loop_in_pytorch(cell):
    """Values and gradients, with weights that differ in every gate."""
    module = Wrapped(make_module(cell, I, H, dtype=np.float64))
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for p, values in zip(module.parameters(), make_weights(cell, I, H, rng), strict=True):
            p.copy_(torch.from_numpy(values))
    x = random(T, B, I, grad=True)
    states = tuple(random(1, B, H, seed=i + 1, grad=True) for i in range(len(CELLS[cell].states)))
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    x_, *states_ = (one.detach().clone().requires_grad_() for one in (x, *states))
    first = tuple(one[0] for one in states_)
    if LOOPED[cell]:
        y, last = loop(cell, x_, first, params)
    else:
        y, last = test_layer_norm.theirs(torch, cell, x_, first, params)
    want = [y, *(one[None] for one in last)]
    torch.autograd.backward(want, [random(*one.shape, seed=5 + i) for i, one in enumerate(want)])
    got, grads = gradients(module, x, states if len(states) == 2 else states[0])
    for a, b in zip(got, want, strict=True):
        assert_close("result", a.detach().numpy(), b.detach().numpy(), "float64", context=cell)
    grads = [x.grad, *(one.grad for one in states), *grads]
    wants = [x_.grad, *(one.grad for one in states_), *(p.grad for p in params.values())]
    for a, b in zip(grads, wants, strict=True):
        assert_close("gradient", a.numpy(), b.numpy(), "float64", "gradient", context=cell)


@pytest.mark.parametrize(
    ("kind", "options", "call"),
    [
        ("LSTM", {"layer_norm": "gates", "bidirectional": True}, {"lengths": [3, 2]}),
        ("LSTM", {"peephole": True, "proj_size": 1}, {"all_states": True}),
        ("GRU", {"learn_initial": True, "merge": "mul", "bidirectional": True}, {}),
        ("RNN", {"activations": ("softsign",), "num_layers": 2, "batch_first": True}, {}),
    ],
)
def test_gradcheck(kind, options, call):
    """All at once, by differences: x, a clamp's values, and parameters that come from elsewhere."""
    module = Wrapped(getattr(rnnfast, kind)(2, 3, dtype=np.float64, seed=1, **options))
    names = [name for name, _ in module.named_parameters()]
    lead = (2, 3) if options.get("batch_first") else (3, 2)

    def function(x, values, *weights):
        clamp = Clamp(values, units=[0], layer=-1)
        given = dict(zip(names, weights, strict=True))
        return tuple(flat(functional_call(module, given, (x,), dict(call, clamp=clamp))))

    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert gradcheck(function, (random(*lead, 2, grad=True), random(1, grad=True), *weights))


# --------------------------------------------------------------------------------- what autograd is


def test_clamps_and_their_gradients():
    """Of some clamps that are tensors, of those that want gradients, in their shapes."""
    module, x = lstm(), random(T, B, I)
    values, one = random(T, 1, 2, grad=True), torch.tensor(0.5, dtype=torch.float64)
    one.requires_grad_()
    where = torch.zeros(H, dtype=torch.bool)
    where[3] = True
    clamps = [
        Clamp(values, units=[0, 2]), Clamp(0.25, units=[1], state="c", layer=-1),
    ]  # fmt: skip
    y, _ = module(x, clamp=clamps)
    assert torch.equal(y[:, :, [0, 2]], values.expand(T, B, 2))
    y.sum().backward()
    assert values.grad.shape == values.shape and (values.grad > 0).any()
    module(x, clamp=Clamp(one, where=where))[0].sum().backward()
    assert one.grad.shape == ()
    fixed = module(x, clamp=Clamp(values.detach(), units=[0, 2]))[0]
    assert torch.equal(fixed[:, :, 0], values.detach()[:, :, 0].expand(T, B))


def test_all_states_pass_gradients_alone():
    module, x = lstm(num_layers=2), random(T, B, I, grad=True)
    y, (_, c_n), states = module(x, all_states=True)
    assert isinstance(states, rnnfast.States) and states.c.shape == (2, T, B, H)
    assert torch.equal(states.h[-1], y) and torch.equal(states.c[:, -1], c_n)
    states.c[0, 2].sum().backward(retain_graph=True)
    assert x.grad[:3].any() and not x.grad[3:].any()
    early = x.grad.clone()
    x.grad = None
    c_n.sum().backward()  # of the pair of last states one alone
    assert x.grad[3:].any() and not torch.equal(x.grad, early)
    rnn = Wrapped(rnnfast.RNN(I, H, dtype=np.float64))
    assert rnn(x, all_states=True)[2].c is None


@pytest.mark.parametrize("what", ["x", "weight"])
def test_a_change_between_forward_and_backward_is_seen(what):
    module, x = lstm(), random(T, B, I)
    y, _ = module(x)
    with torch.no_grad():
        {"x": x, "weight": module.weight_hh_l0}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_may_change_between_forward_and_backward():
    """Results, states and values of clamps: what backward needs of them is kept."""
    module, x, values = lstm(), random(T, B, I), random(T, B, 1)
    state = random(1, B, H), random(1, B, H, seed=1)
    clamp = Clamp(values, units=[1])
    _, want = gradients(module, x, state, clamp=clamp)
    module.zero_grad()
    results = flat(module(x, state, clamp=clamp))
    weights = [random(*one.shape, seed=5 + i) for i, one in enumerate(results)]
    changed = [one * 1 for one in results]
    for one in (*state, values, *(one.detach() for one in results)):
        one.add_(1)
    torch.autograd.backward(changed, weights)
    for p, one in zip(module.parameters(), want, strict=True):
        assert torch.equal(p.grad, one)


def test_a_graph_is_walked_again_if_it_is_kept():
    module, x = lstm(), random(T, B, I)
    y, _ = module(x)
    first = torch.autograd.grad(y.sum(), module.weight_hh_l0, retain_graph=True)[0]
    want = first.clone()
    second = torch.autograd.grad((2 * y).sum(), module.weight_hh_l0, retain_graph=True)[0]
    assert torch.equal(second, 2 * want) and torch.equal(first, want)
    node = y.grad_fn
    y.sum().backward()
    assert node.call is None  # the tape is gone, though y is here
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


def test_what_wants_no_gradient_gets_none():
    module, x = lstm(), random(T, B, I, grad=True)
    module.bias_hh_l0.requires_grad_(False)
    module(x)[0].sum().backward()
    assert module.bias_hh_l0.grad is None and module.bias_ih_l0.grad.any() and x.grad.any()
    module.requires_grad_(False)
    x.grad = None
    module(x)[0].sum().backward()
    assert x.grad.any()


def test_no_second_derivatives_nor_transforms():
    module, x = lstm(), random(T, B, I, grad=True)
    with pytest.raises(RuntimeError, match="Wrapped: got a backward pass with create_graph=True"):
        torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    message = "Wrapped: got a call under torch.func.*; needs plain autograd"
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda x: module(x)[0].sum())(x)
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda x: module(x)[0], in_dims=1)(x)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        module(x)


def test_threads_have_their_own_gradients():
    """All go through the one scratch of the module, which kernels fill while others run."""
    module = Wrapped(rnnfast.LSTM(I, 48, seed=0))
    inputs = [random(40, 8, I, seed=seed, dtype=torch.float32) for seed in range(4)]

    def run(x, times=25):
        ys = [module(x)[0].sum() for _ in range(times)]
        return [torch.autograd.grad(y, module.weight_hh_l0)[0] for y in ys]

    want = [run(x, 1)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for one, many in zip(want, pool.map(run, inputs), strict=True):
            assert all(torch.equal(got, one) for got in many)


def test_checkpointing_of_what_drops_nothing():
    module, x = lstm(layer_norm="gates"), random(T, B, I, grad=True)
    module(x)[0].sum().backward()
    want = [x.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    y, _ = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    y.sum().backward()
    for got, one in zip([x.grad, *(p.grad for p in module.parameters())], want, strict=True):
        assert torch.equal(got, one)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_what_drops_is_refused(use_reentrant):
    module, x = lstm(recurrent_dropout=0.5), random(T, B, I, grad=True)
    y, _ = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="no checkpointing of what drops"):
        y.sum().backward()
    y, _ = torch.utils.checkpoint.checkpoint(module.eval(), x, use_reentrant=use_reentrant)
    y.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own look
def test_compile_leaves_the_call_out():
    module = lstm(layer_norm="gates", bidirectional=True)
    head = torch.nn.Linear(2 * H, 2, dtype=torch.float64)
    x = random(T, B, I)

    def model(x):
        return head(module(2 * x, lengths=[6, 1, 3])[0]).sum()

    model(x).backward()
    want = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch.compile(model, backend="aot_eager")(x).backward()
    for p, one in zip(module.parameters(), want, strict=True):
        assert_close("gradient", p.grad.numpy(), one.numpy(), "float64", "gradient")


def test_autocast_is_answered_in_the_modules_dtype():
    module = Wrapped(rnnfast.GRU(I, H, seed=0))
    x, h = random(T, B, I, dtype=torch.bfloat16), random(1, B, H, dtype=torch.bfloat16)
    want, _ = module(x.float(), h.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x, h)
        clamp = rnnfast.Clamp(random(T, B, 1, dtype=torch.bfloat16), units=[2])
        z, _ = module(x, h, clamp=clamp)
    assert torch.equal(y, want)
    assert torch.equal(z[:, :, 2], clamp.values[:, :, 0].float())
    module = lstm()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x, (random(1, B, H), random(1, B, H)))
    assert y.dtype == torch.float64


# ------------------------------------------------------------------------------------- parameters


def agrees(module):
    """Whether all parameters lie where those of the NumPy module do, and the names are these."""
    assert list(module.state_dict()) == list(module.layers.params)
    pairs = zip(module.parameters(), module.layers.params.values(), strict=True)
    return all(np.shares_memory(p.detach().numpy(), view) for p, view in pairs)


def test_an_optimizer_lowers_a_loss():
    module = Wrapped(rnnfast.LSTM(1, 16, layer_norm="gates", zoneout=0.05, seed=0))
    head = torch.nn.Linear(16, 1)
    with torch.no_grad():
        head.weight.copy_(random(1, 16, dtype=torch.float32) / 4)
    wave = torch.sin(torch.arange(41)[:, None, None] / 4 + torch.arange(8)[:, None])
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = ((head(module(wave[:-1])[0]) - wave[1:]) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert agrees(module)
    module.eval()
    with torch.no_grad():
        assert_same_bits("y", module(wave)[0].numpy(), module.layers(wave.numpy())[0])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "copy"])
def test_copies_have_memory_of_their_own(how):
    module, x = lstm(**EVERYTHING), random(T, B, I)
    module.eval()
    module.weight_hh_l1.requires_grad_(False)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif how == "save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.copy(module)
    assert agrees(other) and agrees(module) and not other.training
    assert not other.weight_hh_l1.requires_grad
    assert repr(other) == repr(module)
    want = module(x)[0]
    assert torch.equal(other(x)[0], want)
    with torch.no_grad():
        other.weight_ih_l0.mul_(2)
    assert not torch.equal(other(x)[0], want)
    assert torch.equal(module(x)[0], want) == (how != "copy")


def test_state_dicts_go_both_ways():
    module, other = lstm(seed=1), lstm(seed=2)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert agrees(other) and np.array_equal(other.layers.flat, module.layers.flat)
    theirs = torch.nn.LSTM(I, H, dtype=torch.float64)
    other.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(theirs.weight_hh_l0, module.weight_hh_l0)
    other.load_state_dict(module.state_dict(), assign=True)
    x = random(T, B, I)
    assert torch.equal(other(x)[0], module(x)[0])
    module.layers.load_state_dict(theirs.state_dict())
    assert torch.equal(theirs.weight_hh_l0, module.weight_hh_l0)


def test_parameters_in_other_memory_are_read_there():
    """And what lies in the module's own stays as it is: it may still be somebody's."""
    module, other, x = lstm(seed=1), lstm(seed=2), random(T, B, I)
    before = module.layers.flat.copy()
    want, want_grads = gradients(other, x)
    for name, p in module.named_parameters():
        p.data = getattr(other, name).data.clone()
    got, grads = gradients(module, x)
    for one, two in zip([*got, *grads], [*want, *want_grads], strict=True):
        assert torch.equal(one, two)
    assert np.array_equal(module.layers.flat, before)
    assert agrees(copy.deepcopy(module))
    module.share_memory()
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        other.weight_ih_l0.zero_()
    assert torch.equal(module(x)[0], other(x)[0])
    assert all(p.is_shared() for p in copy.copy(module).parameters())


def test_functional_call_and_what_is_left_alone():
    """Two sets of weights, and then the gradients of both."""
    module, x = lstm(recurrent_dropout=0.3), random(T, B, I)
    sets = [copy.deepcopy(module) for _ in range(2)]
    sets[1].layers.flat[...] *= 2
    before = module.layers.flat.copy()
    given = [
        {name: p.detach().clone().requires_grad_() for name, p in one.named_parameters()}
        for one in sets
    ]
    one, two = (functional_call(module, weights, (x,))[0].sum() for weights in given)
    (one + 2 * two).backward()
    assert module.layers.dropout_calls == 2  # the second call drops something else
    for k, one in enumerate(sets):
        one.layers.dropout_calls = k
        ((k + 1) * one(x)[0].sum()).backward()
        for name, p in one.named_parameters():
            assert torch.equal(given[k][name].grad, p.grad)
    assert np.array_equal(module.layers.flat, before) and agrees(module)


def test_a_parametrisation():
    module, x = lstm(), random(T, B, I)
    before = module.weight_hh_l0.detach().clone()

    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Half())
    other = lstm()
    with torch.no_grad():
        other.weight_hh_l0.mul_(0.5)
    for _ in range(2):  # the first call leaves what the parametrisation is of
        y, _ = module(x)
        assert torch.equal(y, other(x)[0])
    y.sum().backward()
    other(x)[0].sum().backward()
    original = module.parametrizations.weight_hh_l0.original
    assert torch.equal(original, before)
    assert torch.equal(original.grad, other.weight_hh_l0.grad / 2)


# --------------------------------------------------------------------------------------- bad input


def test_what_can_be_wrapped():
    for bad, got in (
        (rnnfast.LSTMCell(I, H), "LSTMCell"), (torch.nn.LSTM(I, H), "LSTM"), (None, "None"),
    ):  # fmt: skip
        match = f"^layers: got {got}; needs an rnnfast.RNN, LSTM or GRU$"
        with pytest.raises(TypeError, match=match):
            Wrapped(bad)
    frozen = rnnfast.LSTM(I, H)
    frozen.freeze()
    with pytest.raises(ValueError, match=r"^layers: got a frozen module; needs unfreeze"):
        Wrapped(frozen)
    layers = rnnfast.LSTM(I, H)
    for bad, match in (
        ({"tape": "none"}, "^tape: got 'none'; needs 'full' or 'light'"),
        ({"grad_clip": 0}, "^grad_clip: got 0; needs a number above 0"),
        ({"grad_clip_norm": np.nan}, "^grad_clip_norm: got nan"),
    ):
        with pytest.raises(ValueError, match=match):
            Wrapped(layers, **bad)
    with pytest.raises(AttributeError):
        Wrapped(layers).layers = layers
    shown = repr(Wrapped(layers, tape="light", grad_clip_norm=2.0))
    assert shown == f"Wrapped(LSTM({I}, {H}), tape='light', grad_clip_norm=2.0)"


X = torch.zeros(T, B, I, dtype=torch.float64)
PACKED = torch.nn.utils.rnn.pack_sequence([X[:, 0]])
NEEDS = "needs a dense torch.float64 tensor on the CPU, as of the module that is wrapped$"


@pytest.mark.parametrize(
    ("x", "call", "match"),
    [
        (X.numpy(), {}, rf"x: got float64 array of shape \(6, 3, {I}\); {NEEDS}"),
        (X.float(), {}, rf"x: got torch.float32 tensor of shape .* on cpu; {NEEDS}"),
        (X.to("meta"), {}, rf"x: got torch.float64 tensor of shape .* on meta; {NEEDS}"),
        (X.to_sparse(), {}, rf"x: got torch.float64 sparse_coo tensor .*; {NEEDS}"),
        (PACKED, {}, "x: got PackedSequence; needs the padded tensor, with its lengths as "),
        (X[0, 0], {}, r"x: got shape \(.*\); needs 3 dimensions"),
        (X, {"state": X}, r"state: got float64 array .*; needs a pair of arrays"),
        (X, {"state": (X[:1, :, :1], X[:1])}, r"state \(h_0\): got shape \(1, 3, 1\); needs"),
        (X, {"state": (X, None)}, rf"state \(c_0\): got None; {NEEDS}"),
        (X, {"lengths": [7, 1, 1]}, r"lengths\[0\]: got 7; needs"),
        (X, {"lengths": [1] * 3, "mask": X[:, :, 0] > 0}, "mask: got one beside lengths"),
        (X, {"clamp": 3}, "clamp: got 3; needs an rnnfast.Clamp"),
        (X, {"clamp": [Clamp(X.float())]}, rf"clamp\[0\].values: got torch.float32 .*; {NEEDS}"),
        (X, {"clamp": Clamp(X[0, 0], [0])}, rf"clamp.values: got shape \({I},\); needs"),
        (X, {"all_states": 1}, "all_states: got 1; needs True or False"),
        (X[0], {"offsets": [0, 9]}, r"offsets: got 0, 9; needs B \+ 1 integers"),
    ],
)  # fmt: skip
def test_bad_calls(x, call, match):
    module = lstm()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises((TypeError, ValueError), match=match):
            module(x, **call)


def test_parameters_of_another_dtype_or_shape_are_named():
    module = lstm().float()
    match = "weight_ih_l0: got torch.float32 tensor of shape .*; needs a dense torch.float64 .*"
    match += "or a module made with dtype=numpy.float32 and wrapped anew"
    with pytest.raises(TypeError, match=match):
        module(X)
    with pytest.raises(TypeError, match=r"tensor on the CPU, as of the module that is wrapped$"):
        lstm().to("meta")(X)
    module.double()
    module(X)
    module.bias_ih_l0 = torch.nn.Parameter(X[0, 0])
    with pytest.raises(ValueError, match="bias_ih_l0: got shape"):
        module(X)
    module.bias_ih_l0 = None
    with pytest.raises(TypeError, match="bias_ih_l0: got None; needs a dense"):
        module(X)
