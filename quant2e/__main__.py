"""``python -m quant2e``: the command line."""

import sys

from quant2e.cli import main

sys.exit(main())
