"""The functions of csrc/vmath.h, by isa: errors in ulp, special values, symmetry, order.

Knows `_kernels.vmath`, which runs as the kernels do: denormals count as signed zero. The truth is
NumPy's in the next precision: float64 for float32, long double for float64.
"""

import numpy as np
import pytest

from rnnfast import _kernels

NAMES = ("exp", "sigmoid", "tanh", "expm1", "softplus")
DTYPES = ("float32", "float64")

# Worst error in ulp of the result. tanh and sigmoid in float32 are the project's promise; the other
# bounds are what csrc/vmath.h states, rounded up, as float64 cannot be tried out whole.
BOUNDS = {
    ("exp", "float32"): 2.0,
    ("sigmoid", "float32"): 2.0,
    ("tanh", "float32"): 1.5,
    ("exp", "float64"): 2.0,
    ("sigmoid", "float64"): 2.5,
    ("tanh", "float64"): 3.0,
    ("expm1", "float32"): 3.0,
    ("expm1", "float64"): 3.0,
    ("softplus", "float32"): 3.0,
    ("softplus", "float64"): 3.0,
}
# By how many ulp a result may be less than that of a smaller x. What follows the polynomials
# of exp, sigmoid and float32's tanh is monotone, roundings included; float64's tanh divides two
# numbers that are rounded apart.
DROPS = {
    ("exp", "float32"): 1,
    ("sigmoid", "float32"): 1,
    ("tanh", "float32"): 0,
    ("exp", "float64"): 2,
    ("sigmoid", "float64"): 2,
    ("tanh", "float64"): 4,
    ("expm1", "float32"): 1,
    ("expm1", "float64"): 2,
    ("softplus", "float32"): 2,
    ("softplus", "float64"): 3,
}

NEXT = {"float32": np.float64, "float64": np.longdouble}
BITS = {"float32": np.uint32, "float64": np.uint64}
PRIME = 4099  # every so many floats in a sample


def compute(name, x):
    """The kernel's result on the current isa."""
    out = np.empty_like(x)
    _kernels.vmath(name, x, out)
    return out


def truth(name, x):
    """The function in the next precision."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wide = x.astype(NEXT[x.dtype.name])
        if name == "tanh":
            return np.tanh(wide)
        if name == "exp":
            return np.exp(wide)
        if name == "expm1":
            return np.expm1(np.where(wide > 0, 0, wide))
        if name == "softplus":
            return np.where(wide < 0, 0, wide) + np.log1p(np.exp(-np.abs(wide)))
        # e / (1 + e) with e <= 1 on the left, 1 / (1 + e) on the right.
        e = np.exp(-np.abs(wide))
        return np.where(wide < 0, e, 1) / (1 + e)


def ordered(y):
    """Integers in the order of the floats, one apart for neighbours; both zeros are 0."""
    integer = np.dtype(f"i{y.itemsize}")
    bits = y.view(integer)
    return np.where(bits < 0, np.iinfo(integer).min - bits, bits)


def ulp_errors(got, want):
    """|got - want| in ulp of want; inf where NaN, inf or a zero's sign is wrong."""
    info = np.finfo(got.dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = want.astype(got.dtype)
        exponent = np.frexp(want)[1] - info.nmant - 1
        error = np.abs(np.ldexp(got.astype(want.dtype) - want, -exponent)).astype(np.float64)
        # What is denormal, or is after a rounding error, may be a zero of the same sign.
        lost = np.abs(want) < info.tiny * (1 + 4 * info.eps)
        error[lost & (got == 0) & (np.signbit(got) == np.signbit(want))] = 0
        error[(np.abs(want) < info.tiny) & (got != 0) & (np.abs(got) != info.tiny)] = np.inf
        same = (np.isnan(got) & np.isnan(want)) | (np.isinf(rounded) & (got == rounded))
        error[same] = 0
        error[np.isnan(got) != np.isnan(want)] = np.inf
        error[np.isinf(got) != np.isinf(rounded)] = np.inf
    return error


def check_errors(name, x, got, want):
    """Fails with the worst input, unless all errors are within the bound; returns the worst."""
    __tracebackhide__ = True
    error = ulp_errors(got, want)
    i = int(np.argmax(error))
    bound = BOUNDS[name, x.dtype.name]
    assert error[i] <= bound, (
        f"{name} {x.dtype} {_kernels.isa()}: {error[i]:.4f} ulp > {bound} at x = {x[i]!r} "
        f"({float(x[i]).hex()}): got {got[i]!r}, want {want[i]!r}; "
        f"{int((error > bound).sum())} of {x.size} are off"
    )
    return float(error[i])


def check_order(name, x, got):
    """Fails if a result falls below an earlier one by more than DROPS; x ascends, without NaN."""
    __tracebackhide__ = True
    y = ordered(got)
    drop = np.maximum.accumulate(y) - y
    i = int(np.argmax(drop))
    allowed = DROPS[name, x.dtype.name]
    j = int(np.argmax(y[: i + 1]))
    assert drop[i] <= allowed, (
        f"{name} {x.dtype} {_kernels.isa()}: f({x[j]!r}) = {got[j]!r} but f({x[i]!r}) = {got[i]!r}"
        f", less by {drop[i]} ulp > {allowed}"
    )


def check_odd(name, x, got):
    """Fails unless name(-x) is -name(x) to the bit."""
    __tracebackhide__ = True
    bits = BITS[x.dtype.name]
    other = compute(name, -x)
    wrong = np.flatnonzero((other.view(bits) != (-got).view(bits)) & ~np.isnan(x))
    assert not wrong.size, (
        f"{name} {x.dtype} {_kernels.isa()}: at x = {x[wrong[0]]!r} f(x) = {got[wrong[0]]!r}, "
        f"f(-x) = {other[wrong[0]]!r}; {wrong.size} of {x.size} differ"
    )


def boundaries(dtype):
    """Where vmath.h changes its ways, where results overflow, vanish or saturate; and 0 and 1."""
    k = np.arange(-1080, 1081) + 0.5
    info = np.finfo(dtype)
    points = [
        [0, float(info.tiny), float(info.eps), 0.5, 1, float(info.max)],
        k * np.log(2),  # k of exp and sigmoid
        np.abs(k) * np.log(2) / 2,  # k of tanh in float64
        (k[k > 1]) * 0.5494 / 1.5,  # in float32
        [float(np.log(np.longdouble(info.max))), -float(np.log(np.longdouble(info.tiny)))],
        [9.1, 19.2, 88, 89, 105, 709, 710, 746],  # limits
    ]
    points = np.concatenate([np.asarray(p, np.float64) for p in points])
    return np.unique(np.concatenate([points, -points])).astype(dtype)


def sample(dtype, count):
    """Ascending floats: neighbours of boundaries, all magnitudes, the range that matters."""
    rng = np.random.default_rng(20)
    bits = BITS[dtype]
    near = boundaries(dtype).view(bits)[:, None] + np.arange(-40, 41).astype(bits)
    if dtype == "float32":
        spread = np.arange(0, 2**32, PRIME, dtype=np.uint64).astype(bits)
    else:
        spread = rng.integers(0, 2**64, count, dtype=bits)
    limit = 100 if dtype == "float32" else 750
    x = [
        near.ravel().view(dtype),
        spread.view(dtype),
        rng.uniform(-limit, limit, count).astype(dtype),
        rng.normal(0, 4, count).astype(dtype),
        np.array([0.0, -0.0, np.inf, -np.inf], dtype),
    ]
    x = np.concatenate(x)
    return np.unique(x[~np.isnan(x)])


SAMPLES = {}


def sampled(name, dtype):
    """The sample and the truth about it, computed once for all isas."""
    if dtype == "float64" and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("long double is no wider than float64 here")
    if (name, dtype) not in SAMPLES:
        x = sample(dtype, 200_000)
        SAMPLES[name, dtype] = x, truth(name, x)
    return SAMPLES[name, dtype]


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_sample(name, dtype, isa, use_isa):
    use_isa(isa)
    x, want = sampled(name, dtype)
    got = compute(name, x)
    check_errors(name, x, got, want)
    check_order(name, x, got)
    if name == "tanh":
        check_odd(name, x, got)


# As (x, result). 1e-310 is a denormal of float64 and a zero of float32.
SPECIAL = {
    "exp": ((0.0, 1), (-0.0, 1), (np.inf, np.inf), (-np.inf, 0.0), (1e-310, 1), (-1e-310, 1)),
    "sigmoid": ((0.0, 0.5), (-0.0, 0.5), (np.inf, 1), (-np.inf, 0.0), (-1e-310, 0.5)),
    "expm1": ((0.0, 0.0), (-0.0, -0.0), (np.inf, 0.0), (-np.inf, -1), (-100, -1), (1e-310, 0.0)),
    "softplus": ((np.inf, np.inf), (-np.inf, 0.0), (1000, 1000), (-1000, 0.0)),
    "tanh": ((0.0, 0.0), (-0.0, -0.0), (np.inf, 1), (-np.inf, -1), (100, 1), (-100, -1)),
}


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_special_values_are_exact(name, dtype, isa, use_isa):
    use_isa(isa)
    x, want = (np.array(v, dtype) for v in zip(*SPECIAL[name], strict=True))
    got = compute(name, x)
    bits = BITS[dtype]
    wrong = got.view(bits) != want.view(bits)
    assert not wrong.any(), f"x = {x[wrong]}: got {got[wrong]}, want {want[wrong]}"


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_keeps_the_sign_of_zeros_and_flushes_denormals(dtype, isa, use_isa):
    use_isa(isa)
    smallest = float(np.finfo(dtype).smallest_subnormal)
    x = np.array([-0.0, -smallest, -1000 * smallest, 0.0, smallest, 1000 * smallest], dtype)
    got = compute("tanh", x)
    assert (got == 0).all() and (np.signbit(got) == np.signbit(x)).all(), got


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_lane(name, dtype, isa, use_isa):
    use_isa(isa)
    bits = BITS[dtype]
    quiet = np.array([np.nan, -np.nan], dtype).view(bits)
    payload = np.concatenate([quiet, quiet + 1, quiet + 12345]).view(dtype)
    for n in range(1, 40):  # whole vectors and all lengths of the rest
        for i in range(n):
            x = np.full(n, 0.5, dtype)
            x[i] = payload[i % payload.size]
            got = compute(name, x)
            assert np.isnan(got[i]), f"f(NaN) = {got[i]!r} at {i} of {n}"
            assert np.isnan(got).sum() == 1, f"a NaN at {i} of {n} spread: {got}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_an_element_does_not_depend_on_its_place(name, dtype):
    x = np.linspace(-12, 12, 67).astype(dtype)
    alone = np.concatenate([compute(name, x[i : i + 1]) for i in range(x.size)])
    assert compute(name, x).tobytes() == alone.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_float32(name, capsys):
    isas = [isa for isa in _kernels.ISAS if _kernels.set_isa(isa)]
    worst = dict.fromkeys(isas, 0.0)
    block = 1 << 21
    last = {}  # by isa: the last results of the block before, to join the order of both
    try:
        # Both halves of the floats are walked from -inf or 0 upwards, NaN's blocks apart.
        for half in (0, 1):
            last.clear()
            for start in range(0, 1 << 31, block):
                first = start if not half else (1 << 31) - block - start
                bits = np.arange(first, first + block, dtype=np.uint32)
                x = (bits[::-1] | np.uint32(1 << 31) if half else bits).view(np.float32)
                want = truth(name, x)
                number = ~np.isnan(x)
                for isa in isas:
                    _kernels.set_isa(isa)
                    got = compute(name, x)
                    worst[isa] = max(worst[isa], check_errors(name, x, got, want))
                    if name == "tanh" and not half:
                        check_odd(name, x, got)
                    x_n, got_n = x[number], got[number]
                    if isa in last:
                        x_n = np.concatenate([last[isa][0], x_n])
                        got_n = np.concatenate([last[isa][1], got_n])
                    if x_n.size:
                        check_order(name, x_n, got_n)
                        last[isa] = x_n[-4096:], got_n[-4096:]
    finally:
        assert _kernels.set_isa("auto")
    with capsys.disabled():
        print(f"\n{name} float32, worst ulp:", {isa: round(w, 4) for isa, w in worst.items()})
