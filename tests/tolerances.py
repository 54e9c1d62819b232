"""The one place that says how close is close enough, and why; `assert_close` judges by it.

Knows arrays and bounds. Leaves to the tests what they compare with what.
"""

import numpy as np

# Largest error allowed, in the relative L2 norm |got - want| / |want|. float32 has eps = 1.2e-7
# and float64 2.2e-16. A sum of K products errs by about sqrt(K) eps / 2 and a tanh or sigmoid by
# 2 eps; through time the recurrence passes errors on, but its gates damp them. Together that is
# 1e-7 .. 1e-6 in float32: the bounds leave room for the longest sums and steps of the tests, and
# none for a formula with less than single precision in it. A gradient is a product along two
# passes, hence twice (float32) or, since fewer of its digits are of interest, ten times that.
BOUNDS = {
    ("float32", "forward"): 5e-6,
    ("float32", "gradient"): 1e-5,
    ("float64", "forward"): 1e-13,
    ("float64", "gradient"): 1e-12,
}

# The complex step has no cancellation, so it differs from backward by rounding alone: a few eps for
# each of the few dozen operations from an input to the loss.
COMPLEX_STEP = 1e-13

# The promise to float32's users: at most this many times the error of plain float32 NumPy.
TIMES_NUMPY = 2.0

# A step is judged by its own norm, lest the large steps hide an error in the early, vanished ones.
# One thing is granted: where a step's norm happens to cancel, its error comes from its neighbours
# in time, which feed it, so that at least this fraction of their norm counts. A gradient has to
# fall by more than the inverse of it in one step for this to make a difference.
NEIGHBOURS = 0.1

# Kernels take denormals as zero, the reference does not. What is lost is below the smallest normal
# number before it meets a weight, and weights here stay far below this factor.
DENORMAL = 1e3


def bound(dtype, what):
    """The bound for a "forward" result or a "gradient" of this dtype."""
    return BOUNDS[np.dtype(dtype).name, what]


def norm(array, axis=None):
    """The L2 norm, without BLAS, whose threads take longer to wake than these sums take."""
    return np.sqrt(np.square(array).sum(axis=axis))


def relative_error(got, want):
    """|got - want| / |want| in the L2 norm, computed in float64; 0 if both are equal."""
    error = norm(np.asarray(got, np.float64) - want)
    return float(error / norm(want)) if error else 0.0


def assert_close(name, got, want, dtype, what="forward", *, context="", time_axis=None, share=1):
    """Fails unless `got`, of `dtype`, is `want` (at least float64) within the bound for `what`.

    Checked are the relative L2 norm of the error over the whole array; that of each slice along
    `time_axis`, if there is one; and that no element is off by more than the same fraction of
    the largest element. `context` is printed on failure: cell, dtype, isa, shape, seed; `share` of
    the bound may be used.
    """

    def fail(problem):
        __tracebackhide__ = True
        error = np.abs(got - want)
        index = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), want.shape)
        where = ", ".join(str(int(i)) for i in index)
        raise AssertionError(
            f"{name} ({what}, {np.dtype(dtype).name}): {problem}\n"
            f"worst at {name}[{where}]: got {got[index]!r}, want {want[index]!r}, "
            f"off by {error[index]:.3g}; largest element {np.abs(want).max():.3g}\n"
            f"shape {want.shape}; {context}"
        )

    __tracebackhide__ = True
    got, want = np.asarray(got), np.asarray(want)
    context = str(context)
    assert got.dtype == dtype, f"{name}: got dtype {got.dtype}, want {dtype}; {context}"
    assert got.shape == want.shape, f"{name}: got shape {got.shape}, want {want.shape}; {context}"
    assert np.isfinite(want).all(), f"{name}: the reference is not finite; {context}"
    if got.size == 0:
        return
    got = got.astype(np.float64)
    if not np.isfinite(got).all():
        fail(f"{int((~np.isfinite(got)).sum())} of {got.size} elements are not finite")

    limit = share * bound(dtype, what)
    tiny = DENORMAL * float(np.finfo(dtype).tiny)
    error = np.abs(got - want)
    largest = np.abs(want).max()
    if error.max() > limit * largest + tiny:
        fail(f"an element is off by {error.max() / largest:.3g} of the largest > {limit:.0e}")
    if norm(error) > limit * norm(want) + tiny * want.size**0.5:
        fail(f"relative error {norm(error) / norm(want):.3g} > {limit:.0e}")
    if time_axis is None:
        return

    steps = want.shape[time_axis]
    rows = np.moveaxis(want, time_axis, 0).reshape(steps, -1)
    norms = norm(rows, axis=1)
    errors = norm(np.moveaxis(error, time_axis, 0).reshape(steps, -1), axis=1)
    padded = np.concatenate([[0.0], norms, [0.0]])
    scale = np.maximum(norms, NEIGHBOURS * np.maximum(padded[:-2], padded[2:]))
    excess = errors - (limit * scale + tiny * rows.shape[1] ** 0.5)
    t = int(np.argmax(excess))
    if excess[t] > 0:
        fail(f"at step {t} of {steps}, relative error {errors[t] / scale[t]:.3g} > {limit:.0e}")


def assert_same_bits(name, got, want, *, context=""):
    """Fails unless both arrays have the same dtype, shape and bits (NaNs and zeros included)."""
    __tracebackhide__ = True
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{name}: {got.dtype} {got.shape} is not {want.dtype} {want.shape}; {context}"
    )
    if got.tobytes() == want.tobytes():
        return
    unsigned = f"u{got.dtype.itemsize}"
    differ = np.argwhere(got.view(unsigned) != want.view(unsigned))
    index = tuple(int(i) for i in differ[0])
    raise AssertionError(
        f"{name}: {len(differ)} of {got.size} elements differ, the first at {list(index)}: "
        f"{got[index]!r} is not {want[index]!r}; shape {got.shape}; {context}"
    )
