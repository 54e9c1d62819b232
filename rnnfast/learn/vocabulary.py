"""Vocabulary: text to token numbers and back, by characters or by words.

Knows strings and NumPy arrays. Leaves to `corpus` where text comes from, to `batches` its cutting.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

UNITS = ("char", "word")
UNKNOWN = 0  # the number of the token that stands for everything not in the vocabulary
UNKNOWN_TEXT = "\N{REPLACEMENT CHARACTER}"  # how it is written out

# Every character of a text is in exactly one match, so that joined words are the text again.
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")


class Vocabulary:
    """The known tokens of a text, numbered from 1 on; number 0 is the unknown token.

    `unit` is "char" or "word" (runs of letters and digits, runs of space, single other signs);
    `tokens` are distinct strings in the order of their numbers.

    >>> vocabulary = Vocabulary.from_text("banana", min_count=2)
    >>> vocabulary.tokens
    ('a', 'n')
    >>> vocabulary.encode("ban")
    array([0, 1, 2], dtype=int32)
    >>> Vocabulary.from_text("to be or not to be", unit="word").tokens
    (' ', 'be', 'to', 'not', 'or')
    """

    def __init__(self, tokens: Iterable[str], unit: str = "char") -> None:
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
        self.unit = unit
        self.tokens = tuple(tokens)
        if not all(isinstance(token, str) for token in self.tokens):
            raise TypeError("tokens must be strings")
        self._numbers = {token: number for number, token in enumerate(self.tokens, 1)}
        if len(self._numbers) != len(self.tokens):
            raise ValueError("tokens must be distinct")
        if unit == "char":
            if any(len(token) != 1 for token in self.tokens):
                raise ValueError("tokens of the unit 'char' must be single characters")
            # The number of each code point up to the largest known; one more for all beyond.
            self._table = np.full(max(map(ord, self.tokens), default=0) + 2, UNKNOWN, np.int32)
            for token, number in self._numbers.items():
                self._table[ord(token)] = number

    @classmethod
    def from_text(cls, text: str, unit: str = "char", min_count: int = 1) -> Vocabulary:
        """The tokens that occur at least `min_count` times in `text`, the most frequent first.

        >>> len(Vocabulary.from_text("banana"))  # a, b, n and the unknown token
        4
        """
        counts = Counter(text if unit == "char" else _WORDS.findall(text))
        kept = (token for token, count in counts.items() if count >= min_count)
        return cls(sorted(kept, key=lambda token: (-counts[token], token)), unit)

    def __len__(self) -> int:
        """Number of tokens, the unknown one included: V, the size of a softmax over them."""
        return 1 + len(self.tokens)

    def encode(self, text: str) -> np.ndarray:
        """Token numbers of a text, int32 [N]; what is not in the vocabulary becomes `UNKNOWN`.

        >>> Vocabulary("ab").encode("abc")
        array([1, 2, 0], dtype=int32)
        """
        if self.unit == "char":
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
            return self._table[np.minimum(points, len(self._table) - 1)]
        numbers = self._numbers
        words = _WORDS.findall(text)
        return np.fromiter((numbers.get(word, UNKNOWN) for word in words), np.int32, len(words))

    def unknown_in(self, text: str) -> tuple[str, ...]:
        """The distinct tokens of a text that are not in the vocabulary, in the text's order.

        >>> Vocabulary("ab").unknown_in("a cab, c")
        (' ', 'c', ',')
        """
        tokens = text if self.unit == "char" else _WORDS.findall(text)
        return tuple(dict.fromkeys(token for token in tokens if token not in self._numbers))

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of token numbers; an unknown token is written as U+FFFD.

        >>> Vocabulary("ab").decode([2, 1, 1])
        'baa'
        """
        texts = (UNKNOWN_TEXT, *self.tokens)
        return "".join([texts[number] for number in np.asarray(numbers).tolist()])

    def to_json(self) -> dict:
        """What `from_json` takes, made of strings, lists and dicts alone.

        >>> Vocabulary.from_json(Vocabulary("ab").to_json()).tokens
        ('a', 'b')
        """
        return {"unit": self.unit, "tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, data: dict) -> Vocabulary:
        """The vocabulary that `to_json` described.

        >>> len(Vocabulary.from_json({"unit": "char", "tokens": ["x"]}))
        2
        """
        return cls(data["tokens"], data["unit"])
