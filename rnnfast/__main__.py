"""`python -m rnnfast`: the same as the command `rnnfast`."""

from .cli import main

raise SystemExit(main())
