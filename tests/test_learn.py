"""Tests of `rnnfast.learn`: text, batches, layers, optimisers, and a trainer that loses nothing.

Knows the public names of `rnnfast.learn`. Leaves the command line to test_cli and
PyTorch to test_twin.
"""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import rnnfast
from rnnfast import storage
from rnnfast.learn import (
    IGNORED,
    SGD,
    UNKNOWN,
    Adam,
    Corpus,
    DataError,
    Embedding,
    LanguageModel,
    Linear,
    OneHot,
    RandomBatches,
    SequentialBatches,
    Settings,
    Trainer,
    Vocabulary,
    clip_gradients,
    cross_entropy,
    one_blas_thread,
    perplexity,
    read_settings,
    standard_library,
    text_file,
    warm_up_and_cosine,
)
from rnnfast.learn.layers import total_loss

TEXT = "".join(f"def f{k}(x):\n    return {k} * x + {k * k % 97}\n\n" for k in range(120))
CORPUS = Corpus(TEXT[:-400], TEXT[-400:], manifest="a text of the tests", files=1)
SMALL = Settings(hidden=12, embedding=6, batch=3, steps_per_chunk=7, steps=40)


def numerical_gradient(f, x, step=1e-3):
    """Central differences, exact to the fourth order, of the number f() by each element of x."""

    def f_at(shift):
        x[index] = kept + shift * step
        return f()

    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        gradient[index] = (8 * (f_at(1) - f_at(-1)) - (f_at(2) - f_at(-2))) / (12 * step)
        x[index] = kept
    return gradient


def assert_same_gradient(found, expected, name, tolerance=1e-9):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, f"{name}: relative L2 error {error:.2e}"


# ---------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("unit", ["char", "word"])
def test_decoding_gives_back_any_text_of_known_tokens(unit):
    text = "Grüße,\n\tx_1 = 'ß' \U0001f600\r\n  … e\u0301"
    vocabulary = Vocabulary.from_text(text, unit)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert UNKNOWN not in vocabulary.encode(text)


@pytest.mark.parametrize("unit", ["char", "word"])
def test_rare_and_new_tokens_are_unknown(unit):
    vocabulary = Vocabulary.from_text("a a a b b c", unit, min_count=2)
    numbers = vocabulary.encode("a b c d \U0010ffff")
    known = [number != UNKNOWN for number in numbers]
    assert known == [True, True, True, True, False, True, False, True, False]
    assert vocabulary.decode(numbers) == "a b \ufffd \ufffd \ufffd"


def test_vocabulary_survives_json():
    import json

    for unit in ("char", "word"):
        vocabulary = Vocabulary.from_text(TEXT, unit)
        again = Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
        assert again.unit == unit and again.tokens == vocabulary.tokens
        assert np.array_equal(again.encode(TEXT), vocabulary.encode(TEXT))


@pytest.mark.parametrize(
    ("tokens", "unit", "error"),
    [(["a", "a"], "char", ValueError), (["ab"], "char", ValueError), ([1], "word", TypeError),
     (["a"], "byte", ValueError)],
)  # fmt: skip
def test_wrong_vocabularies_are_refused(tokens, unit, error):
    with pytest.raises(error):
        Vocabulary(tokens, unit)


# -------------------------------------------------------------------------------------- corpus


def test_sources_are_split_by_file_wherever_they_are(tmp_path):
    for root in (tmp_path / "one", tmp_path / "two"):
        (root / "pack" / "tests").mkdir(parents=True)
        for k in range(60):
            (root / "pack" / f"m{k}.py").write_text(f"module {k};\n")
        (root / "pack" / "tests" / "t.py").write_text("a test;\n")
        (root / "latin.py").write_bytes(b"caf\xe9;\n")
        (root / "notes.txt").write_text("no source;\n")
    one, two = (standard_library(tmp_path / name) for name in ("one", "two"))
    assert one == two
    train, held_out = (part.split(";\n")[:-1] for part in (one.train, one.held_out))
    names = {line.strip() for line in train} ^ {line.strip() for line in held_out}
    assert names == {f"module {k}" for k in range(60)}
    assert one.files == 60 and 1 <= len(held_out) <= 20

    (tmp_path / "two" / "pack" / "m7.py").write_text("module 7!\n")
    assert standard_library(tmp_path / "two").manifest != one.manifest


def test_a_file_is_split_into_its_beginning_and_its_end(tmp_path):
    path = tmp_path / "text"
    path.write_text("ä" * 95 + "b" * 10, encoding="utf-8")
    corpus = text_file(path)
    assert corpus.train + corpus.held_out == "ä" * 95 + "b" * 10
    assert corpus.held_out == "b" * 10


@pytest.mark.parametrize("content", [b"", b"ab\xff"])
def test_unusable_files_are_refused(tmp_path, content):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(DataError, match="text"):
        text_file(path)


# ------------------------------------------------------------------------------------- batches

SHAPES = [(100, 2, 5), (101, 3, 7), (1000, 8, 13), (40, 4, 8), (23, 1, 1), (6, 1, 3)]


@pytest.mark.parametrize("kind", [RandomBatches, SequentialBatches])
@pytest.mark.parametrize(("length", "rows", "steps"), SHAPES)
def test_every_batch_is_whole_and_no_token_comes_twice(kind, length, rows, steps):
    batches = kind(np.arange(length), rows, steps, seed=3)
    for epoch in range(4):
        seen = []
        for index in range(len(batches)):
            batch = batches.get(epoch, index)
            assert batch.inputs.shape == batch.targets.shape == (steps, rows)
            # In a text of 0, 1, 2, ... both the next step and the target are one more.
            assert np.array_equal(batch.targets, batch.inputs + 1)
            assert np.array_equal(batch.inputs[1:], batch.inputs[:-1] + 1)
            seen.append(batch.inputs.ravel())
        seen = np.concatenate(seen)
        assert len(np.unique(seen)) == len(seen)
        # What is left out is less than one more batch and the random offset.
        assert length - len(seen) < rows * steps + 2 * steps + rows


def test_sequential_rows_go_on_where_they_ended():
    batches = SequentialBatches(np.arange(500), 4, 6, seed=1)
    for epoch in range(3):
        for index in range(1, len(batches)):
            before, batch = batches.get(epoch, index - 1), batches.get(epoch, index)
            assert np.array_equal(batch.inputs[0], before.targets[-1])
            assert not batch.fresh
        assert batches.get(epoch, 0).fresh


def test_random_batches_are_shuffled_and_fresh():
    batches = RandomBatches(np.arange(2000), 4, 5, seed=1)
    firsts = [batches.get(0, index).inputs[0] for index in range(len(batches))]
    assert all(batches.get(0, index).fresh for index in range(len(batches)))
    steps = np.diff(np.concatenate(firsts))
    assert (np.abs(steps) > 5).mean() > 0.9


@pytest.mark.parametrize("kind", [RandomBatches, SequentialBatches])
def test_batches_are_a_function_of_seed_epoch_and_index(kind):
    text = np.arange(700)
    forwards, jumping = kind(text, 3, 5, seed=9), kind(text, 3, 5, seed=9)
    there = {(e, i): forwards.get(e, i).inputs for e in range(3) for i in range(len(forwards))}
    for epoch, index in [(2, 3), (0, 1), (2, 0), (1, 5), (0, 0)]:
        assert np.array_equal(jumping.get(epoch, index).inputs, there[epoch, index])
    assert not np.array_equal(there[0, 0], there[1, 0]) or not np.array_equal(
        there[0, 0], there[2, 0]
    )
    other = kind(text, 3, 5, seed=10)
    assert any(not np.array_equal(other.get(e, 0).inputs, there[e, 0]) for e in range(3))


@pytest.mark.parametrize("kind", [RandomBatches, SequentialBatches])
def test_the_shortest_text_is_named_and_is_enough(kind):
    with pytest.raises(DataError, match="needs 30") as caught:
        kind(np.arange(29), 5, 5)
    assert "29 tokens" in str(caught.value)
    assert len(kind(np.arange(30), 5, 5)) == 1
    for epoch in range(20):
        kind(np.arange(30), 5, 5, seed=4).get(epoch, 0)


# ------------------------------------------------------------------------- layers and the loss


def test_embedding_against_one_hot_product():
    rng = np.random.default_rng(0)
    weight, grad = rng.standard_normal((11, 4)), np.full((11, 4), 0.5)
    tokens = rng.integers(0, 9, (6, 5))
    layer, one_hot = Embedding(weight, grad), OneHot(11, np.float64).forward(tokens)
    np.testing.assert_array_equal(layer.forward(tokens), one_hot @ weight)
    dx = rng.standard_normal((6, 5, 4))
    layer.backward(tokens, dx)
    expected = 0.5 + np.einsum("tbv,tbe->ve", one_hot, dx)
    np.testing.assert_allclose(grad, expected, rtol=1e-13, atol=1e-13)


def test_linear_gradients():
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((5, 4)), rng.standard_normal((5, 3))
    weight, bias = rng.standard_normal((3, 4)), rng.standard_normal(3)
    layer = Linear(weight, bias, np.zeros((3, 4)), np.zeros(3))

    def loss():
        return float((layer.forward(x) * dy).sum())

    dx = layer.backward(x, dy)
    for name, array, found in [
        ("x", x, dx), ("weight", weight, layer.dweight), ("bias", bias, layer.dbias)
    ]:  # fmt: skip
        assert_same_gradient(found, numerical_gradient(loss, array), name)


def test_cross_entropy_gradient_and_ignored_targets():
    rng = np.random.default_rng(2)
    logits, targets = 3 * rng.standard_normal((7, 5)), rng.integers(0, 5, 7)
    targets[[1, 6]] = IGNORED

    def loss():
        return cross_entropy(logits.copy(), targets)[0]

    gradient = logits.copy()
    value, count = cross_entropy(gradient, targets)
    valid = targets != IGNORED
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(softmax[valid, targets[valid]]).mean()
    assert count == 5 and math.isclose(value, expected, rel_tol=1e-13)
    assert_same_gradient(gradient, numerical_gradient(loss, logits), "logits")
    total, counted = total_loss(logits.copy(), targets)
    assert counted == 5 and math.isclose(total, 5 * value, rel_tol=1e-13)


def test_cross_entropy_of_extreme_logits():
    logits = np.array([[1e4, 0, -1e4], [-1e30, 1e30, 0]], np.float32)
    value, _ = cross_entropy(logits, np.array([2, 1]))
    assert value == pytest.approx(1e4)
    np.testing.assert_array_equal(logits, [[0.5, 0, -0.5], [0, 0, 0]])
    assert math.isnan(cross_entropy(np.zeros((1, 2)), np.array([IGNORED]))[0])
    assert math.isnan(cross_entropy(np.array([[math.nan, 0.0]]), np.array([1]))[0])


def test_products_on_one_thread():
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()
                if pool["user_api"] == "blas"]  # fmt: skip

    before = threads()
    with one_blas_thread():
        assert all(count == 1 for count in threads())
    assert threads() == before


def test_perplexity_of_a_hopeless_loss():
    assert perplexity(1e9) == math.inf
    assert math.isnan(perplexity(math.nan))


# ---------------------------------------------------------------------------------- optimisers


def test_sgd_against_its_formula():
    rng = np.random.default_rng(3)
    p, g = rng.standard_normal(9), np.empty(9)
    optimizer, expected, v = SGD([(p, g)], lr=0.3, momentum=0.8), p.copy(), np.zeros(9)
    for _ in range(5):
        g[...] = rng.standard_normal(9)
        v = 0.8 * v + g
        expected -= 0.3 * v
        optimizer.step()
    np.testing.assert_allclose(p, expected, rtol=1e-14)


def test_adam_against_its_formula():
    rng = np.random.default_rng(4)
    p, g = rng.standard_normal(9), np.empty(9)
    optimizer, expected = Adam([(p, g)], lr=0.1, betas=(0.8, 0.95), eps=1e-3), p.copy()
    m, v = np.zeros(9), np.zeros(9)
    for k in range(1, 6):
        g[...] = rng.standard_normal(9)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        expected -= 0.1 * (m / (1 - 0.8**k)) / (np.sqrt(v / (1 - 0.95**k)) + 1e-3)
        optimizer.step()
    np.testing.assert_allclose(p, expected, rtol=1e-12)


@pytest.mark.parametrize("make", [lambda b: SGD(b, 0.1, 0.9), lambda b: Adam(b, 0.1)])
def test_optimisers_go_on_from_their_state(make):
    rng = np.random.default_rng(5)
    p, g = rng.standard_normal(4), rng.standard_normal(4)
    optimizer = make([(p, g)])
    optimizer.step()
    q, kept = p.copy(), {name: array.copy() for name, array in optimizer.state().items()}
    optimizer.step()
    again = make([(q, g)])
    again.load_state(kept)
    again.step()
    assert np.array_equal(p, q)
    for wrong in ({}, kept | {"more": p}, {name: a[:0] for name, a in kept.items()}):
        with pytest.raises(ValueError, match="state"):
            again.load_state(wrong)


def test_clipping_is_by_the_norm_of_all_together():
    a, b = np.array([3.0, 0.0]), np.array([[4.0]])[0]
    assert clip_gradients([a, b], 10.0) == 5.0 and a[0] == 3.0
    assert clip_gradients([a, b], 0.5) == 5.0
    np.testing.assert_allclose([a[0], b[0]], [0.3, 0.4], rtol=1e-6)
    clip_gradients([a], 1e-6)
    assert a[0] == pytest.approx(0.3 * 1e-6 / (0.3 + 1e-6), 1e-7)


def test_the_learning_rate_rises_and_falls():
    shares = [warm_up_and_cosine(k, 200, 20) for k in range(200)]
    assert shares[0] == pytest.approx(0.05) and max(shares) == max(shares[15:25])
    assert np.all(np.diff(shares[:15]) > 0) and np.all(np.diff(shares[20:]) < 0)
    assert 0 < shares[-1] < 1e-3
    assert warm_up_and_cosine(0, 10, 0) == 1


# ------------------------------------------------------------------------------ language model


@pytest.mark.parametrize("embedding_size", [0, 3])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_gradients_of_the_whole_model(cell, embedding_size):
    vocabulary = Vocabulary("abcd")
    model = LanguageModel(vocabulary, cell, 4, 2, embedding_size, dtype=np.float64, seed=7)
    rng = np.random.default_rng(8)
    inputs, targets = rng.integers(0, 5, (2, 6, 3))
    _, state = model.gradients(inputs, targets)
    model.gradients(inputs, targets, state)

    def loss():
        x = model.embedding.forward(inputs)
        y, _ = model.rnn(x, state)
        return cross_entropy(model.head.forward(y.reshape(-1, 4)), targets.ravel())[0]

    for name, param in model.params.items():
        expected = numerical_gradient(loss, param)
        assert_same_gradient(model.grads[name], expected, name, 1e-8)


def test_evaluation_counts_every_token_once():
    model = LanguageModel(Vocabulary("ab"), "gru", 5, 1, 3, dtype=np.float64, seed=1)
    tokens = np.random.default_rng(1).integers(0, 3, 203)
    y, _ = model.rnn(model.embedding.forward(tokens[:-1, None]))
    expected, count = total_loss(model.head.forward(y[:, 0]), tokens[1:])
    assert count == 202
    assert model.evaluate(tokens, batch_size=1, steps=17) == pytest.approx(expected / 202, 1e-12)
    # With four rows, 51 steps long, rows start from zero states; two of the 204 places are empty.
    rows = [model.evaluate(tokens[51 * k : 51 * k + 52], 1) for k in range(3)]
    rows.append(model.evaluate(tokens[153:], 1))
    expected = (51 * sum(rows[:3]) + 49 * rows[3]) / 202
    assert model.evaluate(tokens, batch_size=4, steps=10) == pytest.approx(expected, 1e-12)
    assert math.isnan(model.evaluate(tokens[:1]))


def test_generation_is_the_models_own_distribution():
    model = LanguageModel(Vocabulary("abc"), "lstm", 6, 1, 4, seed=2)
    model.params["head.weight"][...] = 0
    model.params["head.bias"][...] = np.log([0.4, 0.1, 0.2, 0.7])  # the first is unknown
    text = model.sample("", 4000, seed=3)
    shares = [text.count(letter) / 4000 for letter in "abc"]
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=0.03)
    cold = model.sample("", 4000, temperature=0.5, seed=3)
    np.testing.assert_allclose(cold.count("c") / 4000, 0.49 / 0.54, atol=0.03)
    assert model.sample("ab", 5, temperature=0) == "abccccc"


def test_generation_feeds_its_output_back():
    trainer = Trainer(Settings(hidden=32, batch=4, steps_per_chunk=10, steps=300, lr=1e-2),
                      Corpus("abcdefgh" * 200, "", "letters", 1))  # fmt: skip
    while not trainer.done:
        trainer.advance()
    assert trainer.model.sample("abc", 13, temperature=0) == "abcdefghabcdefgh"


def test_a_model_survives_its_file(tmp_path):
    for cell in ("rnn", "lstm", "gru"):
        model = LanguageModel(Vocabulary.from_text(TEXT), cell, 8, 2, 3, seed=1)
        model.save(tmp_path / "model.npz")
        again = LanguageModel.load(tmp_path / "model.npz")
        assert again.params.keys() == model.params.keys()
        assert all(np.array_equal(again.params[n], p) for n, p in model.params.items())
        assert again.sample("def", 40, seed=1) == model.sample("def", 40, seed=1)


# ------------------------------------------------------------------------------------- trainer


def contents(trainer):
    """All arrays that the next step depends on."""
    arrays = {f"model.{name}": array for name, array in trainer.model.params.items()}
    arrays |= trainer.optimizer.state()
    arrays |= {f"carried.{k}": array for k, array in enumerate(trainer._carried)}
    return {name: array.copy() for name, array in arrays.items()}


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), f"{name} differs"


CASES = [
    dict(cell=cell, sampling=sampling, optimizer=optimizer)
    for cell, sampling, optimizer in [
        ("lstm", "sequential", "adam"), ("lstm", "random", "sgd"), ("gru", "sequential", "sgd"),
        ("rnn", "random", "adam"), ("rnn", "sequential", "adam"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_a_resumed_run_has_the_same_bits(tmp_path, case):
    settings = Settings(**case, hidden=12, layers=2, embedding=6, batch=3, steps_per_chunk=31)
    settings = Settings(**vars(settings) | dict(steps=110, lr=0.01))
    whole = Trainer(settings, CORPUS)
    # In the middle of an epoch, at its last step, and just after it.
    epoch = len(whole.batches)
    assert 20 < epoch < 55
    path = tmp_path / "checkpoint.npz"
    resumed = Trainer(settings, CORPUS)
    losses = []
    while not whole.done:
        losses.append(whole.advance())
        assert resumed.advance() == losses[-1]
        if resumed.step in (1, epoch // 2, epoch - 1, epoch, 2 * epoch):
            resumed.save(path)
            resumed = Trainer.resume(path, CORPUS)
    assert_same_bits(contents(whole), contents(resumed))
    assert whole.evaluate() == resumed.evaluate()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_the_state_is_carried_only_where_the_text_goes_on():
    trainer = Trainer(SMALL, CORPUS)
    states = []
    gradients = trainer.model.gradients

    def watched(inputs, targets, state):
        loss, after = gradients(inputs, targets, state)
        states.append((state, after))
        return loss, after

    trainer.model.gradients = watched
    epoch = len(trainer.batches)
    trainer.step = epoch - 2
    for _ in range(4):
        trainer.advance()
    (_, one), (second, two), (third, _), (fourth, _) = states
    assert all(np.array_equal(a, b) for a, b in zip(one, second, strict=True))
    assert two is not None and third is None  # a new epoch
    assert fourth is not None


def test_gradients_that_are_not_finite_change_nothing(monkeypatch):
    trainer = Trainer(SMALL, CORPUS)
    trainer.advance()
    before = contents(trainer)
    gradients = trainer.model.gradients

    def overflowing(*arguments):
        loss = gradients(*arguments)
        trainer.model.grads["head.bias"][0] = np.inf
        return loss

    monkeypatch.setattr(trainer.model, "gradients", overflowing)
    with pytest.raises(FloatingPointError, match="the loss overflowed at step 2"):
        trainer.advance()
    assert_same_bits(before, contents(trainer))
    assert trainer.step == 1


def test_evaluation_does_not_pass_over_an_overflow():
    trainer = Trainer(SMALL, CORPUS)
    trainer.model.params["head.bias"][0] = np.inf
    with pytest.raises(FloatingPointError, match="the loss overflowed at step 0"):
        trainer.evaluate()
    trainer.held_out = trainer.held_out[:1]  # no token to foretell is no overflow
    assert math.isnan(trainer.evaluate())


def test_a_file_of_a_language_model_is_named_where_a_module_was_expected(tmp_path):
    trainer = Trainer(SMALL, CORPUS)
    trainer.save(tmp_path / "checkpoint.npz")
    trainer.model.save(tmp_path / "model.npz")
    for name, what in (("checkpoint", "LanguageModel checkpoint"), ("model", "LanguageModel")):
        with pytest.raises(storage.DamagedFileError, match=f"'{what}'"):
            rnnfast.load(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("sampling", [RandomBatches, SequentialBatches])
def test_any_text_that_is_too_short_is_refused(sampling):
    for length in range(50):
        if length < 10 + 5 * 4:
            with pytest.raises(DataError, match=f"{length} tokens: too short .* needs 30"):
                sampling(np.zeros(length, int), 2, 10)
        else:
            assert len(sampling(np.zeros(length, int), 2, 10)) >= 1


def test_a_loss_that_is_not_finite_changes_nothing():
    trainer = Trainer(SMALL, CORPUS)
    trainer.advance()
    trainer.model.params["head.bias"][0] = np.nan
    before = contents(trainer)
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.advance()
    assert_same_bits(before, contents(trainer))
    assert trainer.step == 1


def test_a_checkpoint_of_another_text_is_refused(tmp_path):
    path = tmp_path / "checkpoint.npz"
    Trainer(SMALL, CORPUS).save(path)
    other = Corpus(CORPUS.train, CORPUS.held_out, "another", 1)
    with pytest.raises(DataError, match="another text"):
        Trainer.resume(path, other)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.npz"
    trainer = Trainer(SMALL, CORPUS)
    trainer.advance()
    trainer.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for kind in range(60):
        data = bytearray(whole)
        if kind % 3 == 0:
            del data[int(rng.integers(len(data))) :]
        elif kind % 3 == 1:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        else:
            at = int(rng.integers(len(data)))
            data[at : at + 100] = bytes(100)
        path.write_bytes(data)
        # Bits that mean nothing (a time stamp, an attribute) may change; then all must be there.
        try:
            again = Trainer.resume(path, CORPUS)
        except storage.DamagedFileError as error:
            assert str(path) in str(error)
        else:
            assert_same_bits(contents(again), contents(trainer))


@pytest.mark.parametrize("change", ["model.head.bias", "optimizer.m.0", "carried.0", "step"])
@pytest.mark.parametrize("how", ["missing", "shape", "text"])
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, change, how):
    path = tmp_path / "checkpoint.npz"
    trainer = Trainer(SMALL, CORPUS)
    trainer.advance()
    trainer.save(path)
    header, arrays = storage.read(path)
    if change == "step":
        if how == "missing":
            del header["training"]["step"]
        else:
            header["training"]["step"] = "many" if how == "text" else [1]
    elif how == "missing":
        del arrays[change]
    elif how == "shape":
        arrays[change] = arrays[change][..., :-1]
    else:
        arrays[change] = np.frombuffer(b"text", np.uint8)
    storage.write(path, header, arrays)
    with pytest.raises(storage.DamagedFileError, match="checkpoint"):
        Trainer.resume(path, CORPUS)


def test_settings_are_read_from_a_checkpoint_alone(tmp_path):
    path = tmp_path / "file.npz"
    trainer = Trainer(SMALL, CORPUS)
    trainer.save(path)
    assert read_settings(path) == SMALL
    trainer.model.save(path)
    with pytest.raises(storage.DamagedFileError):
        read_settings(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden", 0), ("hidden", 8.0), ("hidden", True), ("lr", 0.0), ("lr", math.nan), ("lr", "1"),
     ("clip", math.inf), ("cell", "tree"), ("cell", 3), ("sampling", "none"), ("steps", -1),
     ("optimizer", "newton"), ("unit", "byte"), ("embedding", -1), ("text", None), ("other", 1)],
)  # fmt: skip
def test_impossible_settings_are_refused(tmp_path, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        Settings(**{name: value})
    path = tmp_path / "checkpoint.npz"
    Trainer(SMALL, CORPUS).save(path)
    header, arrays = storage.read(path)
    header["training"]["settings"][name] = value
    storage.write(path, header, arrays)
    with pytest.raises(storage.DamagedFileError, match=name):
        Trainer.resume(path, CORPUS)


KILLED_WHILE_SAVING = """
import os, signal, sys
import numpy as np
from rnnfast import storage
from rnnfast.learn import Corpus, Trainer, read_settings

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half(file, **members):
    file.write(bytes(1000))
    file.flush()
    die()

path, where, text = sys.argv[1:]
corpus = Corpus(text[:-400], text[-400:], "a text of the tests", 1)
trainer = Trainer.resume(path, corpus)
trainer.advance()
replace = os.replace
if where == "writing":
    np.savez = half
elif where == "before the rename":
    os.replace = die
else:
    os.replace = lambda old, new: (replace(old, new), die())
trainer.save(path)
"""


@pytest.mark.parametrize("where", ["writing", "before the rename", "after the rename"])
def test_killed_while_saving(tmp_path, where):
    path = tmp_path / "checkpoint.npz"
    trainer = Trainer(SMALL, CORPUS)
    trainer.save(path)
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(path), where, TEXT]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = Trainer.resume(path, CORPUS)
    assert again.step == (1 if where == "after the rename" else 0)
    if again.step:
        trainer.advance()
    assert_same_bits(contents(again), contents(trainer))
