"""`python -m u2moe.runtime.cli`: the command line."""

import sys

from u2moe.runtime.cli import main

sys.exit(main())
