"""Trainer: the training loop as an object that can be stopped, saved and resumed at any step.

Knows the model, the batches, the optimisers and the checkpoint file. Leaves when to stop, to save
and what to show to its caller (`rnnfast.cli` is one). A resumed run continues with the same bits as
one that was never interrupted: all that a step depends on is in the checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import numpy as np

from .. import storage
from .batches import SAMPLINGS
from .corpus import Corpus, DataError
from .language_model import CELLS, LanguageModel, without_prefix
from .optimizers import OPTIMIZERS, clip_gradients, warm_up_and_cosine
from .vocabulary import UNITS, Vocabulary

_CHOICES = {"unit": UNITS, "cell": CELLS, "sampling": SAMPLINGS, "optimizer": OPTIMIZERS}
_MAY_BE_ZERO = ("embedding", "momentum", "seed")
WARM_UP = 0.05  # share of all steps in which the learning rate rises


@dataclass(frozen=True)
class Settings:
    """All that a run depends on, its text and the machine aside.

    `text` is the path of its file, or "" for the standard library; `steps` is the number of
    optimiser steps in all; `lr` the peak of the learning rate, which rises for the first steps and
    then falls to zero along a cosine.
    """

    text: str = ""
    unit: str = "char"
    min_count: int = 1
    cell: str = "lstm"
    hidden: int = 256
    layers: int = 1
    embedding: int = 64
    batch: int = 32
    steps_per_chunk: int = 64
    sampling: str = "sequential"
    optimizer: str = "adam"
    lr: float = 4e-3
    momentum: float = 0.9
    clip: float = 1.0
    steps: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what no run can be made of."""
        for field in dataclasses.fields(self):
            value, usual = getattr(self, field.name), field.default
            kinds = (int, float) if type(usual) is float else (type(usual),)
            if type(value) not in kinds:
                raise TypeError(f"{field.name} must be {type(usual).__name__}, got {value!r}")
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                choices = ", ".join(_CHOICES[field.name])
                raise ValueError(f"{field.name} must be one of {choices}, got {value!r}")
            low = 0 if field.name in _MAY_BE_ZERO else math.ulp(0)  # above zero, for integers: 1
            if field.type != "str" and not low <= value < math.inf:
                raise ValueError(f"{field.name} is out of range: {value!r}")


class Trainer:
    """A model in training on a corpus; `step` is the number of steps done.

    >>> corpus = Corpus("spam and eggs. " * 20, "eggs and spam.", manifest="none", files=1)
    >>> settings = Settings(hidden=8, batch=2, steps_per_chunk=5, steps=3)
    >>> trainer = Trainer(settings, corpus)
    >>> while not trainer.done:
    ...     loss = trainer.advance()
    >>> trainer.step
    3
    """

    def __init__(
        self, settings: Settings, corpus: Corpus, model: LanguageModel | None = None
    ) -> None:
        """`model` None makes a new one, with a vocabulary from the training text."""
        if model is None:
            model = LanguageModel(
                Vocabulary.from_text(corpus.train, settings.unit, settings.min_count),
                settings.cell,
                settings.hidden,
                settings.layers,
                settings.embedding,
                seed=settings.seed,
            )
        self.settings = settings
        self.manifest = corpus.manifest
        self.model = model
        self.batches = SAMPLINGS[settings.sampling](
            model.vocabulary.encode(corpus.train),
            settings.batch,
            settings.steps_per_chunk,
            settings.seed,
        )
        self.held_out = model.vocabulary.encode(corpus.held_out)
        options = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
        self.optimizer = OPTIMIZERS[settings.optimizer](model.buffers, settings.lr, **options)
        self.step = 0
        self._carried: tuple[np.ndarray, ...] = ()  # the recurrent state; empty: zeros

    @property
    def done(self) -> bool:
        """Whether all steps of the settings are done."""
        return self.step >= self.settings.steps

    @property
    def tokens_per_step(self) -> int:
        """T·B."""
        return self.settings.batch * self.settings.steps_per_chunk

    def advance(self) -> float:
        """One step of the optimiser on the next mini-batch; returns its mean loss in nats.

        Raises FloatingPointError, with nothing changed, if the loss or a gradient is not finite.
        """
        settings = self.settings
        # The number of steps done is the whole position in the data.
        batch = self.batches.get(*divmod(self.step, len(self.batches)))
        state = None if batch.fresh else self._state()
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            loss, state = self.model.gradients(batch.inputs, batch.targets, state)
            norm = clip_gradients([grads for _, grads in self.model.buffers], settings.clip)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(f"the loss overflowed at step {self.step + 1}")
        share = warm_up_and_cosine(self.step, settings.steps, int(WARM_UP * settings.steps))
        self.optimizer.lr = settings.lr * share
        self.optimizer.step()
        self._carried = state if isinstance(state, tuple) else (state,)
        self.step += 1
        return loss

    def train_for(self, *, steps: int | None = None, epochs: int | None = None) -> None:
        """Sets the number of steps in all, the ones already done included; or that of epochs.

        This also changes the learning rate of the steps still to come.
        """
        if epochs is not None:
            steps = epochs * len(self.batches)
        if steps is not None:
            self.settings = dataclasses.replace(self.settings, steps=steps)

    def _state(self):
        """The carried state in the form that the module takes: one array, or a tuple of them."""
        if len(self._carried) == 1:
            return self._carried[0]
        return self._carried or None

    def evaluate(self, limit: int | None = None) -> float:
        """Mean loss in nats on held-out text, see `LanguageModel.evaluate`; nan if none.

        Raises FloatingPointError if there is such a text and the loss is not finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            loss = self.model.evaluate(self.held_out, limit=limit)
        if len(self.held_out) > 1 and not math.isfinite(loss):
            raise FloatingPointError(f"the loss overflowed at step {self.step}")
        return loss

    def save(self, path: str | os.PathLike) -> None:
        """Writes a checkpoint, atomically; `LanguageModel.load` reads the model out of it."""
        header = {
            "class": "LanguageModel checkpoint",  # for whoever takes it for a file of a module
            "model": self.model.description(),
            "training": {
                "settings": dataclasses.asdict(self.settings),
                "manifest": self.manifest,
                "step": self.step,
            },
        }
        arrays = {f"model.{name}": array for name, array in self.model.params.items()}
        arrays |= {f"optimizer.{name}": a for name, a in self.optimizer.state().items()}
        arrays |= {f"carried.{k}": array for k, array in enumerate(self._carried)}
        storage.write(path, header, arrays)

    @classmethod
    def resume(cls, path: str | os.PathLike, corpus: Corpus) -> Trainer:
        """The trainer in a checkpoint.

        Raises DamagedFileError if it is damaged, DataError if it was made on another text.
        """
        header, arrays = storage.read(path)
        settings = _settings(path, header)
        if header["training"].get("manifest") != corpus.manifest:
            raise DataError(f"{path}: was made on another text than the one given")
        trainer = cls(settings, corpus, LanguageModel.from_file(path, header, arrays))
        try:
            trainer.optimizer.load_state(without_prefix("optimizer.", arrays))
            trainer._carried = trainer._checked_state(without_prefix("carried.", arrays))
            trainer.step = int(header["training"]["step"])
        except (KeyError, TypeError, ValueError) as error:
            storage.damaged(os.fspath(path), f"no whole state of a trainer ({error})")
        return trainer

    def _checked_state(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        rnn = self.model.rnn
        expected = (rnn.num_layers, self.settings.batch, rnn.hidden_size)
        for name, array in arrays.items():
            if array.shape != expected:
                raise ValueError(
                    f"carried state {name} must be {list(expected)}, got {list(array.shape)}"
                )
        return tuple(arrays[str(k)] for k in range(len(arrays)))


def read_settings(path: str | os.PathLike) -> Settings:
    """The settings in a checkpoint; DamagedFileError if there are none.

    >>> import tempfile
    >>> corpus = Corpus("spam and eggs. " * 20, "", manifest="none", files=1)
    >>> settings = Settings(hidden=8, batch=2, steps_per_chunk=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "checkpoint.npz")
    ...     Trainer(settings, corpus).save(path)
    ...     read_settings(path) == settings
    True
    """
    header, _ = storage.read(path)
    return _settings(path, header)


def _settings(path: str | os.PathLike, header: dict) -> Settings:
    try:
        return Settings(**header["training"]["settings"])
    except (KeyError, TypeError, ValueError) as error:
        storage.damaged(os.fspath(path), f"no settings of a trainer ({error})")
