"""The build of rnnfast._kernels, the one compiled module.

Knows the compiler's flags and the list of C sources; metadata stands in pyproject.toml. Has two
switches: RNNFAST_DEBUG=1 (-O0 -g, asserts alive) and RNNFAST_SANITIZE=address,undefined (or other).
"""

import os
import sys
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("RNNFAST_DEBUG", "") not in ("", "0")
SANITIZE = os.environ.get("RNNFAST_SANITIZE", "")

if sys.platform == "win32":
    raise SystemExit("rnnfast needs GNU vector types and POSIX threads: build it in WSL")

# No -march: each file of csrc/isa/ names its own target. No -ffast-math, ever: it would change the
# floating-point mode of the program that imports us; contraction is written out as fma_() instead.
compile_args = [
    "-std=gnu11",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # Cython's own C
    "-Wno-missing-field-initializers",  # likewise
    "-Wno-psabi",  # vectors are passed only between inlined functions
]
link_args = ["-pthread"]

if DEBUG:
    compile_args += ["-O0", "-g", "-UNDEBUG"]
else:
    compile_args += ["-O2", "-DNDEBUG"]

if SANITIZE:
    compile_args += ["-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
    link_args += [f"-fsanitize={SANITIZE}"]
elif not DEBUG:
    compile_args += ["-g0"]
    link_args += ["-Wl,-s"] if sys.platform == "linux" else []

kernels = Extension(
    "rnnfast._kernels",
    sources=[
        "rnnfast/_kernels.pyx",
        "csrc/dispatch.c",
        "csrc/memory.c",
        "csrc/pool.c",
        "csrc/wavefront.c",
        "csrc/isa/base_f32.c",
        "csrc/isa/base_f64.c",
        "csrc/isa/avx2_f32.c",
        "csrc/isa/avx2_f64.c",
        "csrc/isa/avx512_f32.c",
        "csrc/isa/avx512_f64.c",
    ],
    depends=glob("csrc/*.h") + glob("csrc/*.inc") + glob("csrc/cells/*"),
    include_dirs=["csrc"],
    define_macros=[("Py_LIMITED_API", "0x030b0000"), ("CYTHON_LIMITED_API", "1")],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    py_limited_api=True,
)

setup(
    ext_modules=cythonize([kernels], build_dir="build", language_level=3),
    # Timestamps do not show that a switch changed, so every build is a whole one.
    options={"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"force": True}},
)
