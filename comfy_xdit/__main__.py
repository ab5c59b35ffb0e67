"""`python -m comfy_xdit` from a checkout: the same as the console command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
