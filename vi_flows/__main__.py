"""``python -m vi_flows`` is ``vi-flows``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
