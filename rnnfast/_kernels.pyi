"""Stub of the compiled layer: arrays -> pointers -> struct -> nogil call; no maths, no checks.

Everything here trusts its arguments: `checks` and `functional` have looked at them. "array" is any
object with the buffer protocol. Unless said otherwise arrays are native, aligned and C-contiguous.
T steps, B batch, I input size, H hidden size, D directions, G parameter gates, Gt tape gates.
"""

from typing import Any

FORWARD: int  # what a pack is for
BACKWARD: int
PLANS: tuple[str, ...]  # "auto" and those of rf_plan; a plan's number is its index
CHOICES: tuple[str, ...]  # a closed loop's; a choice's number, as in rf_choice, is its index
ACTIVATIONS: tuple[str, ...]  # of general cells
ISAS: tuple[str, ...]  # compiled in, weakest first; e.g. ("base", "avx2", "avx512")

def isa() -> str: ...
def set_isa(name: str) -> bool:
    """Kernels of packs made from now on; "auto" is the best. False if `name` cannot run here."""

def cpu_count() -> int:
    """Cores this process may run on (its affinity mask)."""

def use_threads(parallel: int, thread: int, threads: int) -> bool:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads, whose threads are to
    be the workers; three zeros: our own are again. False, with nothing done, during a call."""

class Memory:
    """Bytes that arrays may lie in, 64-byte aligned, any contents; offers a writable buffer.

    Kept for the next Memory of its size once the last array has gone. May raise MemoryError.
    """

    def __init__(self, nbytes: int) -> None: ...

def release_memory() -> int:
    """Returns to the system what is kept of memory that nobody uses; how many bytes that were."""

class Pack:
    """Weights of one layer, all its directions, re-laid for the kernels of one isa."""

    isa: str
    dtype: str  # "f" or "d"
    cell: int
    input_size: int
    hidden_size: int
    proj_size: int  # 0: h is not projected
    directions: int
    kind: int  # FORWARD or BACKWARD
    nbytes: int
    functions: tuple | None  # of a general cell

    def __deepcopy__(self, memo: Any) -> Pack: ...

class Packed:
    """A sequence whose rows lie packed: those that run at step 0, those at step 1, and so on.

    data [N, width] with rows of any distance; starts intp [T], the rows of data before each step's;
    shape (T, B, width). Row b is no longer than row b - 1, and not all are equally long. With
    by_rows, the steps of row 0, those of row 1, and so on, of any lengths; starts [B]. It stands
    for x, y, dy and dx below, in calls with the lengths of the rows.
    """

    data: Any
    starts: Any
    shape: tuple[int, int, int]
    dtype: Any  # that of data
    by_rows: bool
    def __init__(
        self, data: Any, starts: Any, shape: tuple[int, int, int], by_rows: bool = False
    ) -> None: ...

def panel_steps(pack: Pack, B: int) -> int:
    """A light tape's slices must be multiples of so many steps, to leave backward's bits alone."""

def workspace(pack: Pack, T: int, B: int, threads: int) -> int:
    """Bytes of scratch that a call with this pack takes, or -1 if that overflows."""

def pack(
    cell: int,
    weights: tuple[tuple[Any, ...], ...],
    kind: int,
    threads: int,
    plan: int,
    sizes: tuple[int, int, int, int] | None = None,
    functions: tuple | None = None,
) -> Pack:
    """One (W [GH, I], R [GH, H], b_ih [GH] or None, b_hh [GH] or None) per direction.

    Further ones as cells.PARAMETERS has them, None for what the cell has not, or nothing at the
    end. With a projection [P, H], the last of all, R is [GH, P]. With sizes = I, H, P (or 0) and
    the bytes of a number, also the addresses of these, as int. functions: what a general cell
    computes with, a `cells.Functions`.
    """

def forward(
    pack: Pack,
    x: Any,  # [T, B, I]; any strides but the last, which is one element
    y: Any,  # out [T, B, D*H]; likewise; zeroed past a row's length
    h_0: Any,  # [D, B, H] or None for zeros
    c_0: Any,  # likewise; None where the cell has no c
    h_n: Any,  # out [D, B, H]
    c_n: Any,  # out [D, B, H] or None
    lengths: Any,  # intp [B] or None
    gates: Any,  # out [D, T, B, Gt, H] or None: no tape. Rows past a length are not written
    h_tape: Any,  # out [D, T+1, B, H] or None; of a light tape [K, D, B, H]
    c_tape: Any,  # likewise
    reverse: bool,  # D = 1: from each row's last valid step to its first. D = 2: the second does
    threads: int,
    plan: int,
    steps: int = 0,  # of a slice, K = max(1, ceil(T / steps)) in all: a light tape; 0: a full one
    times: Any = None,  # intp [B, T]: of rows with holes those of their steps, then the others
    between: Any = None,  # a between.Between, or None
    c_steps: Any = None,  # out [T, B, D*H]: c after each step, or None; not written at others
    longest: int = -1,  # if not -1, rows have no more steps, and times [B, longest]
) -> tuple[str, int]:
    """Returns the plan and number of threads that ran. May raise MemoryError, KeyboardInterrupt.

    A light tape has the states before each slice: those of processed steps, cut from the end.
    """

def wavefront_steps(
    cell: int,
    dtype: str,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    layers: int,
    threads: int,
    plan: int,
) -> int:
    """Steps of a slice of `wavefront`; 0 where a stack of one direction is better computed layer by
    layer. dtype "f" or "d"."""

def wavefront(
    packs: tuple[Pack, ...],
    calls: tuple[tuple[Any, ...], ...],  # for each layer what `forward` takes, without lengths
    lengths: Any,
    threads: int,
    plan: int,
    steps: int,
    times: Any = None,
) -> tuple[str, int]:
    """Layers of one direction side by side: x of each is the y of the one below. Calls are
    (x, y, h_0, c_0, h_n, c_n, gates, h_tape, c_tape); T and B are at least 1."""

def backward(
    pack: Pack,  # kind BACKWARD
    x: Any,
    lengths: Any,
    gates: Any,
    h_tape: Any,
    c_tape: Any,
    dy: Any,  # like y, or None for zeros; not read past a row's length
    dh_n: Any,  # [D, B, H] or None for zeros
    dc_n: Any,
    dx: Any,  # out like x, or None: not wanted; zeroed past a row's length
    dh_0: Any,  # out [D, B, H] or None
    dc_0: Any,
    grads: Any,  # out: None, or as weights of pack, each None where not wanted
    reverse: bool,
    threads: int,
    plan: int,
    light: tuple[Pack, int, Any, Any, Any, Any] | None = None,
    add_to: tuple[Any, Any, Any, Any] | None = None,
    replace: bool = False,
    times: Any = None,  # those of forward; so is between
    between: Any = None,
    received: Any = None,  # a between.Received, or None
    longest: int = -1,
) -> tuple[str, int]:
    """Outputs are overwritten, not added to; the tape is never written.

    `add_to`, of one direction: what those gradients are added to at the end, or with `replace` put
    instead of, all or none of them; `grads` is scratch then.

    `light`, for a light tape: forward's pack and steps, the tape's h and c (None where the cell has
    no c), and scratch h_n [B, H] and c_n. Then gates [steps, B, Gt, H], h_tape [steps+1, B, H] and
    c_tape are scratch too, which holds one slice, and dh_0 (and dc_0) must be there.
    """

class Turn:
    """`with Turn(lock) as held`: takes a lock that is free, does without if it is not, or None."""

    def __init__(self, lock: Any) -> None: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None: ...

class Stepper:
    """Layers with fixed packs and their own states, D = 1; runs a block of steps without a check.

    h [L, B, H] and c (None where the cell has none) are the states, written in place at each step.
    """

    def __init__(
        self,
        packs: tuple[Pack, ...],
        h: Any,
        c: Any,
        batch_size: int,
        threads: int,
        plan: int,
        hold_h: float = 0,
        hold_c: float = 0,
    ) -> None:
        """hold: the shares that h and c keep of what they were, at each step."""
    def step(self, x: Any, out: Any) -> bool:
        """x [B, I] (or [I] if B = 1) to out [B, H] (or [H]).

        False, with nothing done, if either is not just a native, aligned, C-contiguous array of
        that shape and dtype, `out` writable and apart from x.
        """
    def process(self, x: Any, y: Any) -> None:
        """x [T, B, I] to y [T, B, H], both checked by the caller."""
    def __enter__(self) -> None:
        """Keeps other calls out; ValueError if one is under way, as in these."""
    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None: ...

def closed_loop(
    packs: tuple[Pack, ...],  # FORWARD, of layers of one direction
    h: Any,  # in, out [L, B, N]: changed only if the call ends well
    c: Any,  # likewise [L, B, H], or None
    weight: Any,  # [O, N] of the head
    bias: Any,  # [O] or None
    x: Any,  # in, out [steps, B, I]: x[0], all numbers of x but each row's first O, and rows that
    # are not `own` are given. Of tokens [1, B, I], one-hot [1, B, 1], with the first step's
    own: Any,  # bool [steps, B] or None: rows of x whose first O numbers are the o before; not x[0]
    outputs: Any,  # out [steps, B, O] or None; any strides but the last
    tokens: Any,  # out intp [steps, B], any strides; None if choice is "value"
    table: Any,  # [O, I] inputs by token, or None
    one_hot: bool,  # rows of x are the place of their only 1
    choice: int,  # its index in CHOICES
    steps: int,
    B: int,
    O: int,
    temperature: float,
    seed: int,
    step0: int,
    row0: int,
    hold_h: float,  # without a tape: the share of the state before in that after
    hold_c: float,
    tapes: tuple[tuple[Any, ...], ...] | None,  # for each layer gates, h, c as of `forward`, and
    # y [steps, B, N], the x of the layer above, or None
    threads: int,
    plan: int,
) -> tuple[tuple[str, int], tuple[int, int] | None]:
    """Returns what ran, and step and row where no token could be chosen, or None; there, as with an
    error, the states are as they were. May raise MemoryError, KeyboardInterrupt."""

def closed_loop_backward(
    packs: tuple[Pack, ...],  # BACKWARD
    tapes: tuple[tuple[Any, Any, Any], ...],  # gates, h, c of each layer
    weight: Any,  # [O, N]
    d_outputs: Any,  # in, out [steps, B, O]: by each o as a result; then by each o
    dx: Any,  # out [steps, B, I]
    own: Any,  # as of the forward call
    dh: Any,  # out [steps, B, N]: by the last layer's h through o, as a dy
    dh_state: Any,  # in, out [L, B, N]: by the last states; then by the first ones
    dc_state: Any,  # likewise [L, B, H], or None
    threads: int,
    plan: int,
) -> None:
    """All but the gradients of weights. May raise MemoryError, KeyboardInterrupt."""

def dropout(
    x: Any, out: Any, p: float, seed: int, call: int, layer: int, threads: int, plan: int
) -> None:
    """out = x * mask / (1 - p), [T, B, N] each; the mask is reference.dropout_mask's."""

def dropout_mask(
    out: Any,  # bool [T, B, N]
    opposite: bool,  # what is dropped, instead of what is kept
    p: float,
    seed: int,
    call: int,
    layer: int,
    threads: int,
    plan: int,
) -> None:
    """The mask itself."""

def vmath(name: str, x: Any, out: Any) -> None:
    """Elementwise "exp", "tanh", "sigmoid", "softplus", or "expm1" of min(x, 0), of a 1-d array, on
    the current isa."""

def multiply_add(dtype: str, rounds: int, threads: int) -> float:
    """Multiply-adds in registers, timed as the machine's peak; returns the operations done."""

def read(nbytes: int, rounds: int, threads: int) -> float:
    """Reads at least nbytes of memory, its own for each thread, over and over, timed as a cache's
    bandwidth; returns the bytes read."""
