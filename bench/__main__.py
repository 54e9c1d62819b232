"""`python -m rnnfast.bench`: the same as `rnnfast bench`."""

import sys

from rnnfast.cli import main

raise SystemExit(main(["bench", *sys.argv[1:]]))
