"""The language model beside its twin in PyTorch: the same losses, step by step.

Knows `rnnfast.learn` and the twin in `rnnfast.bench.language_model`. Needs PyTorch; the optimisers
are held against PyTorch's own here, and against their formulas in test_learn.
"""

import numpy as np
import pytest

from rnnfast.bench.language_model import Twin
from rnnfast.learn import SGD, Adam, Corpus, Settings, Trainer, clip_gradients, standard_library

torch = pytest.importorskip("torch")

STEPS = 50
SMALL = dict(hidden=48, embedding=16, batch=8, steps_per_chunk=24, steps=STEPS)
CASES = {
    "lstm, adam": dict(cell="lstm", optimizer="adam", lr=0.01),
    "lstm, sgd clipped": dict(cell="lstm", optimizer="sgd", lr=2.0, clip=0.1),
    "two layers of gru, adam": dict(cell="gru", layers=2, optimizer="adam", lr=0.01),
    "gru, sgd clipped": dict(cell="gru", optimizer="sgd", lr=2.0, clip=0.1),
    "rnn, adam, random": dict(cell="rnn", optimizer="adam", lr=5e-3, sampling="random"),
    "rnn, sgd clipped": dict(cell="rnn", optimizer="sgd", lr=0.5, clip=0.1),
}


@pytest.fixture(scope="module")
def corpus():
    whole = standard_library()
    # 64 rows of 80 tokens and the next one: the twin's evaluation drops what does not fill a row.
    return Corpus(whole.train[:30_000], whole.held_out[: 64 * 80 + 1], "a part", whole.files)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """PyTorch's threads and ours would fight over the cores, step by step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_the_twin_has_the_same_losses(corpus, case):
    ours = Trainer(Settings(**SMALL | CASES[case]), corpus)
    twin = Twin(ours)
    losses = np.array([(ours.advance(), twin.advance()) for _ in range(STEPS)])
    first, last = losses[0].mean(), losses[-5:].mean()
    assert last < 0.8 * first, f"the loss only fell from {first:.3f} to {last:.3f}"
    errors = np.abs(losses[:, 0] / losses[:, 1] - 1)
    worst = int(errors.argmax())
    assert errors[worst] < 1e-4, (
        f"step {worst + 1}: loss {losses[worst, 0]:.7f} here, {losses[worst, 1]:.7f} in PyTorch"
    )
    if CASES[case].get("clip"):
        norm = clip_gradients([grads for _, grads in ours.model.buffers], 1e-3)
        assert norm == pytest.approx(CASES[case]["clip"], 1e-3), "nothing was clipped"
    assert ours.evaluate() == pytest.approx(twin.evaluate(ours.held_out), 1e-4)


@pytest.mark.parametrize("name", ["adam", "sgd", "sgd with momentum"])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_optimisers_and_clipping_as_in_pytorch(name, max_norm):
    make = {
        "adam": (lambda b: Adam(b, 0.02), lambda p: torch.optim.Adam(p, 0.02)),
        "sgd": (lambda b: SGD(b, 0.2), lambda p: torch.optim.SGD(p, 0.2)),
        "sgd with momentum": (
            lambda b: SGD(b, 0.2, 0.9), lambda p: torch.optim.SGD(p, 0.2, momentum=0.9)
        ),
    }[name]  # fmt: skip
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(n) for n in (5, 3)]
    grads = [np.empty(n) for n in (5, 3)]
    theirs = [torch.tensor(p, requires_grad=True) for p in params]
    optimizer, their_optimizer = make[0](list(zip(params, grads, strict=True))), make[1](theirs)
    for _ in range(20):
        for g, p in zip(grads, theirs, strict=True):
            g[...] = rng.standard_normal(g.shape)
            p.grad = torch.tensor(g)
        norm = clip_gradients(grads, max_norm)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), 1e-12)
        optimizer.step()
        their_optimizer.step()
    for p, q in zip(params, theirs, strict=True):
        np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-12)
