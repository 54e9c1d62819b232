"""The package as it is shipped: the wheel, the stable ABI, and the stub of the compiled module.

Knows file names and formats. Leaves what the code computes to the other tests.
"""

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import rnnfast
from rnnfast import _kernels

ROOT = Path(__file__).parent.parent
STUB = Path(rnnfast.__file__).with_name("_kernels.pyi")
MODULE = Path(_kernels.__file__)


@pytest.fixture(scope="module")
def wheel():
    path = os.environ.get("RNNFAST_WHEEL")
    if path is None:
        pytest.skip("RNNFAST_WHEEL names no wheel (.ci/run builds one)")
    with zipfile.ZipFile(path) as archive:
        yield Path(path), archive


def test_wheel_is_small(wheel):
    assert wheel[0].stat().st_size <= 2_000_000


def test_wheel_serves_every_python_from_3_11(wheel):
    python, abi = wheel[0].stem.split("-")[2:4]
    assert (python, abi) == ("cp311", "abi3")
    compiled = [n for n in wheel[1].namelist() if n.endswith((".so", ".dylib"))]
    assert compiled == ["rnnfast/_kernels.abi3.so"]


def test_wheel_holds_each_module_and_nothing_else(wheel):
    names = {n for n in wheel[1].namelist() if ".dist-info/" not in n}
    sources = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in (("rnnfast", "rnnfast"), ("rnnfast/bench", "bench"))
        for path in (ROOT / folder).rglob("*.py")
    }
    extra = {"rnnfast/_kernels.abi3.so", "rnnfast/_kernels.pyi", "rnnfast/py.typed"}
    assert names == sources | extra


def test_wheel_needs_numpy_alone(wheel):
    (name,) = (n for n in wheel[1].namelist() if n.endswith(".dist-info/METADATA"))
    lines = wheel[1].read(name).decode().splitlines()
    required = [v for v in lines if v.startswith("Requires-Dist:") and "extra ==" not in v]
    assert required == ["Requires-Dist: numpy>=1.26"]


def test_version_is_one():
    assert importlib.metadata.version("rnnfast") == rnnfast.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert newest.split()[1] == rnnfast.__version__


def test_compiled_module_takes_the_stable_abi():
    assert MODULE.name == "_kernels.abi3.so"


def test_build_knows_no_numpy():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert not [name for name in build["requires"] if "numpy" in name.lower()]
    # What every module built with NumPy's headers carries, and looks up when it is imported.
    assert b"_ARRAY_API" not in MODULE.read_bytes()


def test_import_takes_no_extra():
    code = (
        "import sys, numpy; before = set(sys.modules); import rnnfast; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    roots = {name for name in run.stdout.split() if not name.startswith(("_", "cython"))}
    assert roots - set(sys.stdlib_module_names) - {"numpy"} == {"rnnfast"}


def test_submodules_come_when_they_are_used():
    code = """
        import sys, rnnfast
        names = {"learn", "reference"}
        assert names < set(dir(rnnfast)) and not names & vars(rnnfast).keys()
        assert rnnfast.learn.Adam and rnnfast.reference.sigmoid
        assert "torch" not in sys.modules and "torch" not in dir(rnnfast)
        sys.modules["torch"] = None  # as if it were not installed
        for name in ("torch", "nothing"):
            try:
                getattr(rnnfast, name)
            except (AttributeError, ImportError) as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "rnnfast.torch: needs PyTorch: `pip install torch`",
        "module 'rnnfast' has no attribute 'nothing'",
    ]


def stub_names() -> dict[str, ast.stmt]:
    """Public names of the stub, to the statement that declares each."""
    names = {}
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            names[node.target.id] = node
    return names


def parameters(node: ast.FunctionDef) -> list[str]:
    assert not node.args.vararg
    assert not node.args.kwarg
    return [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]


def test_stub_and_compiled_module_have_the_same_names():
    public = {
        name
        for name, value in vars(_kernels).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(stub_names()) == public


def compiled_parameters(name: str, owner: str = "") -> list[str]:
    """Names of a function's parameters in the Cython source: the binary keeps none, to be fast."""
    source = STUB.with_suffix(".pyx").read_text(encoding="utf-8")
    if owner:
        source = re.split(r"^\S", source.partition(f"cdef class {owner}:")[2], flags=re.M)[0]
    (text,) = re.findall(rf"^{'    ' if owner else ''}def {name}\((.*?)\)\s*:", source, re.M | re.S)
    # Each is "name", "type name" or "type *name", with or without a default.
    return [
        re.findall(r"\w+", part.partition("=")[0])[-1] for part in text.split(",") if part.strip()
    ]


@pytest.mark.parametrize("name", sorted(stub_names()))
def test_stub_tells_the_truth(name):
    node, value = stub_names()[name], getattr(_kernels, name)
    if isinstance(node, ast.FunctionDef):
        assert callable(value)
        assert compiled_parameters(name) == parameters(node)
    elif isinstance(node, ast.ClassDef):
        assert isinstance(value, type)
        for member in node.body:
            if isinstance(member, ast.AnnAssign):
                assert hasattr(value, member.target.id), member.target.id
            elif isinstance(member, ast.FunctionDef):
                assert hasattr(value, member.name), member.name
                assert compiled_parameters(member.name, owner=name) == parameters(member)
    else:
        assert type(value).__name__ == ast.unparse(node.annotation).partition("[")[0]


def test_plans_and_isas():
    assert _kernels.PLANS[:3] == ("auto", "serial", "batch")
    assert _kernels.ISAS[0] == "base"
    assert _kernels.isa() in _kernels.ISAS
