"""``python -m diffrate_ext``."""

import sys

from .cli.main import main

sys.exit(main())
