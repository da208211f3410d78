"""`python -m ava_exp`."""

import sys

from ava_exp.cli import main

if __name__ == "__main__":
    sys.exit(main())
