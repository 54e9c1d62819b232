"""How good the language model of `rnnfast train` is, beside a 5-gram and its twin in PyTorch.

Knows `rnnfast.learn`, NumPy and, if it is installed, PyTorch. All three models see the same
training text and foretell the same held-out text. Run as `python -m rnnfast.bench.language_model`.
"""

from __future__ import annotations

import argparse
import math
import platform
import time

import numpy as np

import rnnfast
from rnnfast.learn import (
    Settings,
    Trainer,
    one_blas_thread,
    perplexity,
    standard_library,
    warm_up_and_cosine,
)
from rnnfast.learn.trainer import WARM_UP

STRENGTHS = 2.0 ** np.arange(-2, 6, 0.5)
BLOCK = 50  # steps that one model takes before it is the other's turn


class NGram:
    """An interpolated n-gram: the chance of a token after the n - 1 tokens before it.

    Counts of all shorter contexts are mixed in, with weights after Witten and Bell (1991, C):
    p(w | h) = (count(h w) + s·kinds(h)·p(w | shorter h)) / (count(h) + s·kinds(h)), where kinds(h)
    is how many different tokens followed h. The strength s, 1 in their paper, is chosen by `fit` on
    the last twentieth of the training text.

    >>> model = NGram(2, order=2)
    >>> model.count(np.array([0, 1, 0, 1, 0, 1]))
    >>> model.loss(np.array([0, 1, 0])) < math.log(2)
    True
    """

    def __init__(self, size: int, order: int = 5) -> None:
        self.size = size
        self.order = order
        self.strength = 1.0

    def fit(self, tokens: np.ndarray) -> None:
        """Chooses the strength, then counts all tokens [N]."""
        cut = len(tokens) - len(tokens) // 20
        self.count(tokens[:cut])
        found = [self._found(tokens[cut:], k) for k in range(self.order)]
        losses = [-np.log(self._mix(found, strength)).mean() for strength in STRENGTHS]
        self.strength = float(STRENGTHS[np.argmin(losses)])
        self.count(tokens)

    def count(self, tokens: np.ndarray) -> None:
        """Counts grams and contexts; both are numbers written in base `size`, the oldest first."""
        self._tables = []
        for k in range(self.order):
            grams, counts = np.unique(self._grams(tokens, k), return_counts=True)
            contexts, starts = np.unique(grams // self.size, return_index=True)
            totals = np.add.reduceat(counts, starts)
            kinds = np.diff(starts, append=len(grams))
            self._tables.append((grams, counts, contexts, totals, kinds))

    def loss(self, tokens: np.ndarray) -> float:
        """Mean of -log p in nats over all tokens [N] but the first.

        The first few tokens, whose context is shorter, are foretold from what there is.
        """
        found = [self._found(tokens, k) for k in range(self.order)]
        return float(-np.log(self._mix(found, self.strength)).mean())

    def _grams(self, tokens: np.ndarray, k: int) -> np.ndarray:
        """[N - 1]: each token but the first, with the k tokens before it; -1 if there are fewer."""
        tokens = tokens.astype(np.int64)
        grams = np.full(len(tokens) - 1, -1)
        whole = np.zeros(max(len(tokens) - max(k, 1), 0), np.int64)
        for age in range(k, -1, -1):
            first = max(k, 1) - age
            whole = whole * self.size + tokens[first : first + len(whole)]
        grams[len(grams) - len(whole) :] = whole
        return grams

    def _found(self, tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count of each gram, count and kinds of its context; 0 where it was never seen."""
        grams, counts, contexts, totals, kinds = self._tables[k]
        asked = self._grams(tokens, k)
        short = asked < 0
        at, there = _search(grams, asked)
        at_context, there_context = _search(contexts, asked // self.size)
        there_context &= ~short
        return (
            np.where(there & ~short, counts[at], 0),
            np.where(there_context, totals[at_context], 0),
            np.where(there_context, kinds[at_context], 0),
        )

    def _mix(self, found: list, strength: float) -> np.ndarray:
        p = np.full(len(found[0][0]), 1 / self.size)
        for count, total, kinds in found:
            weight = strength * kinds
            p = np.where(total > 0, (count + weight * p) / np.maximum(total + weight, 1e-300), p)
        return p


def _search(keys: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the sorted keys each asked one is, and whether it is there at all."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return at, keys[at] == asked


class Twin:
    """The model of a trainer in PyTorch, with the same numbers in it and the same steps ahead.

    It shares the trainer's batches, settings and learning rates, and nothing else.
    """

    def __init__(self, trainer: Trainer) -> None:
        import torch

        self.torch = torch
        self.settings, self.batches = trainer.settings, trainer.batches
        params = {name: torch.tensor(array) for name, array in trainer.model.params.items()}
        size, inputs = params["embedding.weight"].shape
        kind = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
        settings = self.settings
        self.model = torch.nn.ModuleDict(
            {
                "embedding": torch.nn.Embedding(size, inputs),
                "rnn": kind[settings.cell](inputs, settings.hidden, settings.layers),
                "head": torch.nn.Linear(settings.hidden, size),
            }
        )
        self.model.load_state_dict(params)
        self.optimizer = (
            torch.optim.Adam(self.model.parameters(), settings.lr)
            if settings.optimizer == "adam"
            else torch.optim.SGD(self.model.parameters(), settings.lr, settings.momentum)
        )
        self.step = 0
        self.state = None

    def _losses(self, inputs: np.ndarray, targets: np.ndarray, state):
        """Mean loss (a tensor) and the state after the tokens [T, B]."""
        torch = self.torch
        x = self.model["embedding"](torch.from_numpy(inputs.astype(np.int64)))
        y, state = self.model["rnn"](x, state)
        logits = self.model["head"](y).flatten(0, 1)
        wanted = torch.from_numpy(targets.astype(np.int64)).flatten()
        return torch.nn.functional.cross_entropy(logits, wanted), state

    def advance(self) -> float:
        """One step, as `Trainer.advance`."""
        torch, settings = self.torch, self.settings
        share = warm_up_and_cosine(self.step, settings.steps, int(WARM_UP * settings.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * share
        batch = self.batches.get(*divmod(self.step, len(self.batches)))
        state = None if batch.fresh else self.state
        loss, state = self._losses(batch.inputs, batch.targets, state)
        self.state = tuple(s.detach() for s in state) if settings.cell == "lstm" else state.detach()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def evaluate(self, tokens: np.ndarray, rows: int = 64, steps: int = 128) -> float:
        """Mean loss in nats, as `LanguageModel.evaluate` (but for the few tokens left over)."""
        columns = (len(tokens) - 1) // rows
        inputs = tokens[: rows * columns].reshape(rows, columns).T
        targets = tokens[1 : rows * columns + 1].reshape(rows, columns).T
        total, state = 0.0, None
        with self.torch.inference_mode():
            for start in range(0, columns, steps):
                piece = slice(start, start + steps)
                loss, state = self._losses(inputs[piece], targets[piece], state)
                total += loss.item() * targets[piece].size
        return total / (rows * columns)


def main(argv: list[str] | None = None) -> int:
    """Trains all models and prints one table."""
    parser = argparse.ArgumentParser(prog="rnnfast.bench.language_model", description=__doc__)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="default: %(default)s")
    parser.add_argument("--no-twin", action="store_true", help="leave PyTorch out")
    args = parser.parse_args(argv)
    with one_blas_thread():
        _compare(args)
    return 0


def _compare(args: argparse.Namespace) -> None:
    from rnnfast.cli import RARE

    corpus = standard_library()
    settings = Settings(min_count=1 + len(corpus.train) // RARE, steps=args.steps)
    ours = Trainer(settings, corpus)
    twin = None if args.no_twin else _twin(ours)
    vocabulary = ours.model.vocabulary
    print(
        f"{platform.processor() or platform.machine()}, {rnnfast.isa()}, "
        f"{rnnfast.get_num_threads()} threads, numpy {np.__version__}, rnnfast "
        f"{rnnfast.__version__}" + (f", torch {twin.torch.__version__}" if twin else "")
    )
    print(
        f"{corpus.files} files, manifest {corpus.manifest[:16]}; {len(corpus.train):,} characters "
        f"to learn from, {len(corpus.held_out):,} held out, {len(vocabulary)} tokens",
        flush=True,
    )

    began = time.perf_counter()
    ngram = NGram(len(vocabulary))
    ngram.fit(vocabulary.encode(corpus.train))
    rows = [("5-gram", ngram.loss(ours.held_out), time.perf_counter() - began)]

    # In turns, so that a busy neighbour on the machine slows both alike.
    seconds = dict.fromkeys((ours, twin), 0.0)
    while not ours.done:
        for model in filter(None, seconds):
            began = time.perf_counter()
            for _ in range(min(BLOCK, settings.steps - model.step)):
                model.advance()
            seconds[model] += time.perf_counter() - began
    rows.append(("rnnfast", ours.evaluate(), seconds[ours]))
    if twin:
        rows.append(("PyTorch twin", twin.evaluate(ours.held_out), seconds[twin]))

    print(f"{'model':14} {'perplexity':>10} {'bits/char':>10} {'seconds':>8} {'tokens/s':>10}")
    for name, loss, took in rows:
        tokens = len(corpus.train) if name == "5-gram" else settings.steps * ours.tokens_per_step
        print(
            f"{name:14} {perplexity(loss):10.4f} {loss / math.log(2):10.4f} {took:8.1f} "
            f"{tokens / took:10,.0f}"
        )
    print(f"strength of the 5-gram: {ngram.strength:.3g}")


def _twin(trainer: Trainer) -> Twin | None:
    try:
        return Twin(trainer)
    except ImportError:
        print("PyTorch is not installed: no twin")
        return None


if __name__ == "__main__":
    raise SystemExit(main())
