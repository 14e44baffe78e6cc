"""``python -m locoprop_kernels.compile_report``."""

import sys

from locoprop_kernels.compile_report import main

if __name__ == "__main__":
    sys.exit(main())
