"""``python -m bench.gpu``."""

import os
import sys

if "--dry-run" in sys.argv:
    # Triton reads it when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
