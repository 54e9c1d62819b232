"""A language model: tokens -> embedding -> recurrent layers -> linear -> which token comes next.

Knows the layers, the recurrent modules and the vocabulary. Leaves changing the parameters to
`optimizers` and the order of all things to `trainer`. T steps, B batch, V tokens in the vocabulary,
E embedding size, H hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from .. import storage
from ..modules import GRU, LSTM, RNN
from .layers import IGNORED, Embedding, Linear, OneHot, cross_entropy, total_loss
from .vocabulary import UNKNOWN, Vocabulary

CELLS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


class LanguageModel:
    """A recurrent language model over a vocabulary; parameters named and started as in PyTorch.

    `embedding_size` 0 feeds tokens as one-hot vectors. All numbers are in two flat buffers with
    their gradients beside them: those of the recurrent layers, and those of embedding and linear
    head; `buffers` is what an optimiser takes. `params` and `grads` are views by name.

    >>> model = LanguageModel(Vocabulary("abc"), "gru", hidden_size=8, embedding_size=5, seed=1)
    >>> list(model.params)[:2], model.params["head.weight"].shape
    (['embedding.weight', 'rnn.weight_ih_l0'], (4, 8))
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        cell: str = "lstm",
        hidden_size: int = 256,
        num_layers: int = 1,
        embedding_size: int = 64,
        *,
        dtype: type = np.float32,
        seed: int | None = None,
    ) -> None:
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
        if embedding_size < 0:
            raise ValueError(f"embedding_size must be 0 or more, got {embedding_size}")
        self.vocabulary = vocabulary
        self.cell = cell
        self.embedding_size = embedding_size
        size = len(vocabulary)
        input_size = embedding_size or size
        self.rnn = CELLS[cell](input_size, hidden_size, num_layers, dtype=dtype, seed=seed)

        shapes = {"head.weight": (size, hidden_size), "head.bias": (size,)}
        if embedding_size:
            shapes["embedding.weight"] = (size, embedding_size)
        ends, self._flat = _views(shapes, dtype)
        end_grads, self._flat_grads = _views(shapes, dtype)
        self.params = _in_order(ends, self.rnn.params)
        self.grads = _in_order(end_grads, self.rnn.grads)
        self.buffers = [
            (self.rnn.flat, self.rnn.flat_grads),
            (self._flat, self._flat_grads),
        ]

        rng = np.random.default_rng(None if seed is None else [seed, 1])
        bound = hidden_size**-0.5
        for name, param in ends.items():
            if name == "embedding.weight":
                param[...] = rng.standard_normal(param.shape)
            else:
                param[...] = rng.uniform(-bound, bound, param.shape)

        if embedding_size:
            name = "embedding.weight"
            self.embedding = Embedding(self.params[name], self.grads[name])
        else:
            self.embedding = OneHot(size, dtype)
        self.head = Linear(
            self.params["head.weight"],
            self.params["head.bias"],
            self.grads["head.weight"],
            self.grads["head.bias"],
        )

    def gradients(self, inputs: np.ndarray, targets: np.ndarray, state=None):
        """Loss and gradients of one mini-batch: forward and back through its T steps, no further.

        `inputs` and `targets` are token numbers [T, B]; `state` is the recurrent state to start
        from, or None for zeros. Overwrites `grads`. Returns (mean loss in nats, state at the end).
        """
        x = self.embedding.forward(inputs)
        y, state, tape = self.rnn.forward_train(x, state)
        rows = y.reshape(-1, y.shape[-1])
        logits = self.head.forward(rows)
        loss, _ = cross_entropy(logits, targets.ravel())

        self._flat_grads.fill(0)
        dy = self.head.backward(rows, logits)  # by now the gradient of the logits
        dx, _ = self.rnn.backward(tape, dy.reshape(y.shape), accumulate=False)
        if self.embedding_size:
            self.embedding.backward(inputs, dx)
        return loss, state

    def evaluate(
        self, tokens: np.ndarray, batch_size: int = 64, steps: int = 128, limit: int | None = None
    ) -> float:
        """Mean loss in nats of foretelling each token of a text from those before it; nan if none.

        The text is cut into `batch_size` long rows that are read side by side, each from a zero
        state. With a `limit`, about so many tokens are read: the first ones of every row.
        """
        total, count, state = 0.0, 0, None
        for inputs, targets in _side_by_side(tokens, batch_size, steps):
            y, state = self.rnn(self.embedding.forward(inputs), state)
            logits = self.head.forward(y.reshape(-1, y.shape[-1]))
            loss, counted = total_loss(logits, targets.ravel())
            total += loss
            count += counted
            if limit is not None and count >= limit:
                break
        return total / count if count else float("nan")

    def generate(
        self, prefix: str = "", temperature: float = 1.0, seed: int | None = None
    ) -> Iterator[str]:
        """Writes on after `prefix`, one token's text at a time and without end.

        Each token is drawn from softmax(logits / temperature) and fed back as the next input;
        temperature 0 takes the most likely one. The unknown token is never drawn.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        rng = np.random.default_rng(seed)
        stream = self.rnn.stream()
        block = self.vocabulary.encode(prefix or "\n")
        y = stream.process(self.embedding.forward(block[:, None]))[-1]
        while True:
            logits = self.head.forward(y).astype(np.float64)[0]
            logits[UNKNOWN] = -np.inf
            if temperature > 0:
                logits = (logits - logits.max()) / temperature
                sums = np.cumsum(np.exp(logits))
                token = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
            else:
                token = int(np.argmax(logits))
            yield self.vocabulary.decode([token])
            y = stream.step(self.embedding.forward(np.array([token])))

    def sample(
        self, prefix: str = "", length: int = 200, temperature: float = 1.0, seed: int | None = None
    ) -> str:
        """`prefix` and the next `length` tokens written after it, see `generate`.

        >>> model = LanguageModel(Vocabulary("abc"), hidden_size=8, seed=1)
        >>> text = model.sample("ab", length=5, seed=1)
        >>> len(text), text[:2]
        (7, 'ab')
        """
        written = self.generate(prefix, temperature, seed)
        return prefix + "".join(next(written) for _ in range(length))

    def description(self) -> dict:
        """What `described` needs, apart from the parameters; JSON can hold it."""
        return {
            "cell": self.cell,
            "hidden_size": self.rnn.hidden_size,
            "num_layers": self.rnn.num_layers,
            "embedding_size": self.embedding_size,
            "dtype": self._flat.dtype.name,
            "vocabulary": self.vocabulary.to_json(),
        }

    @classmethod
    def described(cls, description: dict, params: dict[str, np.ndarray]) -> LanguageModel:
        """The model of a description and its parameters.

        Raises KeyError, TypeError or ValueError if the description is none, or they do not fit.
        """
        model = cls(
            Vocabulary.from_json(description["vocabulary"]),
            description["cell"],
            description["hidden_size"],
            description["num_layers"],
            description["embedding_size"],
            dtype=np.dtype(description["dtype"]).type,
            seed=0,
        )
        model.load_params(params)
        return model

    def load_params(self, params: dict[str, np.ndarray]) -> None:
        """Copies arrays into `params`; raises ValueError on a missing, unused or mis-shaped one."""
        if params.keys() != self.params.keys():
            wrong = sorted(params.keys() ^ self.params.keys())
            raise ValueError(f"params must have exactly the model's names; these differ: {wrong}")
        for name, param in self.params.items():
            given = params[name]
            if given.shape != param.shape or given.dtype != param.dtype:
                raise ValueError(
                    f"params[{name!r}] must be {param.dtype} {list(param.shape)}, "
                    f"got {given.dtype} {list(given.shape)}"
                )
        for name, param in self.params.items():
            param[...] = params[name]

    def save(self, path: str | os.PathLike) -> None:
        """Writes model and vocabulary to one .npz file, atomically."""
        header = {"class": "LanguageModel", "model": self.description()}
        storage.write(path, header, _prefixed("model.", self.params))

    @classmethod
    def load(cls, path: str | os.PathLike) -> LanguageModel:
        """The model in a file of `save`, or in a trainer's checkpoint.

        Raises OSError if it cannot be read, DamagedFileError if it is damaged or something else.

        >>> import tempfile
        >>> model = LanguageModel(Vocabulary("abc"), hidden_size=8, seed=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(os.path.join(folder, "model.npz"))
        ...     again = LanguageModel.load(os.path.join(folder, "model.npz"))
        >>> again.sample("a", seed=1) == model.sample("a", seed=1)
        True
        """
        header, arrays = storage.read(path)
        return cls.from_file(path, header, arrays)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike, header: dict, arrays: dict[str, np.ndarray]
    ) -> LanguageModel:
        """The model among what `storage.read` gave for `path`."""
        try:
            return cls.described(header["model"], without_prefix("model.", arrays))
        except (KeyError, TypeError, ValueError) as error:
            storage.damaged(os.fspath(path), f"no whole language model ({error})")


def _views(shapes: dict[str, tuple[int, ...]], dtype: type) -> tuple[dict, np.ndarray]:
    """Zeroed arrays of these shapes, one behind the other in one buffer; and the buffer."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    flat = np.zeros(sum(sizes), dtype)
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.reshape(shape) for (name, shape), part in named}, flat


def _in_order(ends: dict, middle: dict) -> dict:
    """The arrays in the order in which a token passes them."""
    first = {name: array for name, array in ends.items() if name.startswith("embedding.")}
    last = {name: array for name, array in ends.items() if name.startswith("head.")}
    return first | _prefixed("rnn.", middle) | last


def _prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def without_prefix(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those arrays whose names begin with `prefix`, under the rest of their names.

    >>> without_prefix("a.", {"a.x": 1, "b.x": 2})
    {'x': 1}
    """
    n = len(prefix)
    return {name[n:]: array for name, array in arrays.items() if name.startswith(prefix)}


def _side_by_side(
    tokens: np.ndarray, batch_size: int, steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts (token, next token) pairs into rows, and yields [T, B] pieces until all were yielded.

    The last row is filled up with pairs whose target is `IGNORED`.
    """
    pairs = len(tokens) - 1
    if pairs < 1:
        return
    rows = min(batch_size, pairs)
    columns = -(-pairs // rows)
    inputs = np.zeros(rows * columns, np.int32)
    targets = np.full(rows * columns, IGNORED, np.int32)
    inputs[:pairs] = tokens[:-1]
    targets[:pairs] = tokens[1:]
    inputs, targets = inputs.reshape(rows, columns).T, targets.reshape(rows, columns).T
    for start in range(0, columns, steps):
        yield inputs[start : start + steps], targets[start : start + steps]
