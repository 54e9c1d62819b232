"""Threads: keeps those of NumPy's products from getting in the way of the recurrent kernels'.

Knows threadpoolctl, if it is installed. Leaves the kernels' own threads to `rnnfast.config`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within this, NumPy's products run on one thread; without threadpoolctl nothing changes.

    BLAS libraries keep their threads awake for a while after a product, and these take turns with
    the kernels' on the same cores: on two, a training step of the default model took 1.7 times as
    long. The products are a tenth of its work and lose less on one thread. It also makes their
    bits, and so the whole training's, the same for any number of cores.

    >>> with one_blas_thread():
    ...     pass
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield
