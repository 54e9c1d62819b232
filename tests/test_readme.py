"""Every Python block of README.md runs as it stands, in the README's order, each on its own.

Knows Markdown fences. Leaves the shell commands to .ci/run, which runs the test command.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```$", README, re.M | re.S)


def test_every_block_is_found():
    assert len(BLOCKS) == README.count("```python\n") >= 4


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_block_runs(title, code, tmp_path):
    if "import torch" in code:
        pytest.importorskip("torch")
    # A process of its own: a block must not live on the imports of another, nor leave files here.
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"{title}:\n{run.stderr}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))))
def test_link_leads_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()
