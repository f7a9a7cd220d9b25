"""`python -m mnv4_kernels`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
