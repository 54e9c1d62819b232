"""Derive the constants of vmath.h and print them as C; run by hand, needs mpmath.

Knows the approximated functions, their intervals and which errors weigh how much. Rounding errors
of the evaluation are not seen here: tests/test_vmath.py measures what comes out in the end.

Polynomials are weighted least squares on Chebyshev nodes, which is close to minimax. Coefficients
are rounded to the precision one by one, lowest power first, and the others are fitted anew each
time, so that they make up for the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp
from mpmath import mpf

mp.mp.dps = 50
NODES = 200
LN2 = mp.log(2)
MARGIN = mpf("1.0001")  # of an interval: k is the nearest integer only up to rounding

Real = Callable[[mpf], mpf]


@dataclass(frozen=True)
class Precision:
    """A float format, and how many coefficients bring the error well below rounding's."""

    suffix: str
    bits: int
    free: int  # low bits left zero in the high part of ln 2: k * high is then exact for all k
    exp_terms: int
    tanh_terms: int
    log1p_terms: int
    tanh_limit: str  # tanh rounds to 1 from here
    tanh_offset: int  # k = max(0, round(c |x| - offset))
    tanh_threshold: mpf  # k = 0 below

    @property
    def tanh_step(self) -> mpf:
        """c, such that k becomes 1 at the threshold."""
        return (self.tanh_offset + mpf(1) / 2) / self.tanh_threshold


PRECISIONS = (
    # The threshold is just above atanh(1/2).
    Precision("f", 24, 9, 5, 5, 4, "9.1", 1, mpf("0.5494")),
    Precision("", 53, 12, 10, 6, 10, "19.2", 0, LN2 / 4),
)

EXP_SCALE = mpf(7) / 4


def rounded(value: mpf, bits: int) -> mpf:
    """Return `value` to `bits` significant bits, nearest."""
    mantissa, exponent = mp.frexp(value)
    return mp.ldexp(mp.nint(mp.ldexp(mantissa, bits)), exponent - bits)


def least_squares(f: Real, weight: Real, powers: range, nodes: list[mpf]) -> list[mpf]:
    """Return c that minimise the sum over nodes of (weight(y) (f(y) - sum c_p y^p))^2."""
    a = mp.matrix([[weight(y) * y**p for p in powers] for y in nodes])
    b = mp.matrix([weight(y) * f(y) for y in nodes])
    return list(mp.lu_solve(a, b))


def fit(f: Real, weight: Real, terms: int, low: mpf, high: mpf, bits: int) -> tuple[list[mpf], mpf]:
    """Return rounded coefficients of y^0.. y^(terms-1) on [low, high], and the weighted error."""
    middle, radius = (low + high) / 2, (high - low) / 2
    nodes = [middle + radius * mp.cos(mp.pi * (i + 0.5) / NODES) for i in range(NODES)]
    done: list[mpf] = []

    def rest(y: mpf) -> mpf:
        return f(y) - sum(c * y**p for p, c in enumerate(done))

    for power in range(terms):
        c = least_squares(rest, weight, range(power, terms), nodes)
        done.append(rounded(c[0], bits))
    grid = [low + (high - low) * i / 3001 for i in range(3002)]
    return done, max(abs(weight(y) * rest(y)) for y in grid)


def exp_polynomial(p: Precision) -> tuple[list[mpf], mpf]:
    """Fit C (exp(-r) - 1) = r (-C + r c(r)), |r| <= ln(2)/2, by the relative error of exp(-r)."""
    bound = LN2 / 2 * MARGIN
    return fit(
        lambda r: EXP_SCALE * (mp.exp(-r) - 1 + r) / r**2,
        lambda r: r**2 * mp.exp(r) / EXP_SCALE,
        p.exp_terms,
        -bound,
        bound,
        p.bits,
    )


def tanh_polynomial(p: Precision) -> tuple[list[mpf], mpf]:
    """Fit tanh(u) = u + u y c(y), y = u^2, by the error of tanh(x) where u comes from x.

    u = x - k ln(2)/2 with k = max(0, round(c x - offset)). Where c = 2/ln(2), |u| stays below
    ln(2)/4. A smaller c makes the largest u of each k drift upwards with k, while its weight,
    d tanh(x) / d tanh(u) = (1 - tanh(x)^2) / (1 - tanh(u)^2), falls.
    """
    drift = 1 / p.tanh_step - LN2 / 2
    k_max = mp.nint(mpf(p.tanh_limit) * p.tanh_step - p.tanh_offset)

    def weight(y: mpf) -> mpf:
        u = mp.sqrt(y)
        if u <= p.tanh_threshold * MARGIN:
            return y * u / mp.tanh(u)
        k = mp.ceil((u - p.tanh_threshold) / drift)
        return y * u * (1 - mp.tanh(u + k * LN2 / 2) ** 2) / (1 - mp.tanh(u) ** 2)

    return fit(
        lambda y: (mp.tanh(mp.sqrt(y)) / mp.sqrt(y) - 1) / y,
        weight,
        p.tanh_terms,
        mpf("1e-12"),
        (p.tanh_threshold * MARGIN + k_max * drift) ** 2,
        p.bits,
    )


def log1p_polynomial(p: Precision) -> tuple[list[mpf], mpf]:
    """Fit log(1 + t) = 2 atanh(v/2) = v + v q c(q), 0 <= t <= 1, v = t / (1 + t/2), q = v^2."""
    return fit(
        lambda q: (2 * mp.atanh(mp.sqrt(q) / 2) / mp.sqrt(q) - 1) / q,
        lambda q: q * mp.sqrt(q) / (2 * mp.atanh(mp.sqrt(q) / 2)),
        p.log1p_terms,
        mpf("1e-12"),
        mpf(4) / 9,
        p.bits,
    )


def literal(value: mpf, p: Precision) -> str:
    """Return an exact C literal."""
    mantissa, exponent = float(value).hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}{p.suffix}"


def main() -> None:
    """Print all constants of vmath.h."""
    for p in PRECISIONS:
        high = rounded(LN2, p.bits - p.free)
        print(f"/* {p.bits} bits */")
        for name, value in (
            ("LOG2E", 1 / LN2),
            ("LN2_HI", high),
            ("LN2_LO", LN2 - high),
            ("TANH_STEP", p.tanh_step),
        ):
            print(f"#define RF_{name} {literal(rounded(value, p.bits), p)}")
        for name, (c, error) in (
            ("exp", exp_polynomial(p)),
            ("tanh", tanh_polynomial(p)),
            ("log1p", log1p_polynomial(p)),
        ):
            units = mp.nstr(mp.ldexp(error, p.bits), 2)
            print(f"/* {name}: relative error {mp.nstr(error, 2)} = {units} * 2^-{p.bits} */")
            for power, value in enumerate(c):
                print(f"c{power} = {literal(value, p)}")


if __name__ == "__main__":
    main()
