"""The command line, run by `python -m u2moe.runtime.cli`."""

import sys

from u2moe.runtime.cli import main

sys.exit(main())
