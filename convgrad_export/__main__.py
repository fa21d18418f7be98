"""`python -m convgrad_export` is the command `convgrad`."""

from .cli import main

raise SystemExit(main())
