"""``python -m cheapgrad`` is the command ``cheapgrad``."""

from __future__ import annotations

import sys

from cheapgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
