"""Train in PyTorch, serve with NumPy alone: a character model of Python's own standard library.

    python examples/serve_numpy.py train model.pt    # needs PyTorch; some 15 seconds
    python examples/serve_numpy.py serve model.pt    # needs rnnfast alone, anywhere else too

Both tell how well the model predicts the same held-out text: they must agree. `serve` then lets
the model write on, one step of the network for each byte, and tells how long a step takes.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np

SOURCES = Path(argparse.__file__).parent
HELD_OUT = "textwrap.py"
EMBEDDING, HIDDEN = 32, 128


def text(names: list[str]) -> np.ndarray:
    """The files' bytes, one after the other."""
    return np.concatenate([np.fromfile(SOURCES / name, np.uint8) for name in names])


def train(path: str, steps: int) -> None:
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(256, EMBEDDING)
            self.rnn = nn.LSTM(EMBEDDING, HIDDEN)
            self.head = nn.Linear(HIDDEN, 256)

        def forward(self, x):  # bytes [T, B] -> logits [T, B, 256]
            return self.head(self.rnn(self.embedding(x))[0])

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    names = sorted(p.name for p in SOURCES.glob("*.py") if p.name != HELD_OUT)
    data = torch.from_numpy(text(names).astype(np.int64))
    for step in range(steps):
        starts = torch.randint(len(data) - 65, (32,))
        chunk = data[starts + torch.arange(65)[:, None]]  # [T+1, B]
        loss = nn.functional.cross_entropy(model(chunk[:-1]).flatten(0, 1), chunk[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4}: {loss.item() / np.log(2):.3f} bits per byte", flush=True)

    held_out = torch.from_numpy(text([HELD_OUT])[:5000].astype(np.int64))[:, None]
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(held_out[:-1]).flatten(0, 1), held_out[1:, 0])
    torch.save(model.state_dict(), path)
    print(f"PyTorch: {loss.item() / np.log(2):.3f} bits per byte of {HELD_OUT}; saved {path}")


class Served:
    """The same model in NumPy: takes a byte, gives the chances of each that may come next."""

    def __init__(self, path: str):
        import rnnfast

        weights = rnnfast.load_torch(path)
        rnn = rnnfast.LSTM(EMBEDDING, HIDDEN)
        rnn.load_state_dict(weights, prefix="rnn.")
        self.stream = rnn.stream()  # keeps the state from step to step
        self.embedding = weights["embedding.weight"]
        self.W, self.b = weights["head.weight"], weights["head.bias"]

    def step(self, byte: int) -> np.ndarray:
        y = self.stream.step(self.embedding[byte])  # [E] -> [H]
        logits = (self.W @ y + self.b).astype(np.float64)
        exp = np.exp(logits - logits.max())
        return exp / exp.sum()


def serve(path: str, prefix: str, length: int) -> None:
    model = Served(path)
    held_out = text([HELD_OUT])[:5000]
    start = time.perf_counter()
    bits = -np.log2([model.step(b)[c] for b, c in itertools.pairwise(held_out)])
    per_step = (time.perf_counter() - start) / bits.size
    print(f"NumPy:   {bits.mean():.3f} bits per byte of {HELD_OUT}; {per_step * 1e6:.0f} us a step")

    model.stream.reset()
    rng = np.random.default_rng(0)
    written = bytearray(prefix.encode())
    for byte in written or [ord("\n")]:
        chances = model.step(byte)
    for _ in range(length):
        sharper = chances**1.5
        written.append(rng.choice(256, p=sharper / sharper.sum()))
        chances = model.step(written[-1])
    print(written.decode(errors="replace"))
    assert "torch" not in sys.modules


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    for name, help in ("train", "train with PyTorch"), ("serve", "write text with NumPy"):
        commands.add_parser(name, help=help).add_argument("path")
    commands.choices["train"].add_argument("--steps", type=int, default=500)
    commands.choices["serve"].add_argument("--prefix", default="def ")
    commands.choices["serve"].add_argument("--length", type=int, default=300)
    options = vars(parser.parse_args())
    {"train": train, "serve": serve}[options.pop("command")](**options)
