"""`python -m compressor`: the command line, for whoever has no `compressor` on the path."""

import sys

from compressor.cli import main

if __name__ == "__main__":
    sys.exit(main())
