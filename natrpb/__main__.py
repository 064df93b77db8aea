"""`python -m natrpb`: see `natrpb._cli`."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())
