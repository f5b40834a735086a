"""Run a recipe from a checkout: `python compress.py recipes/xception_slim.yaml`."""

import sys

from compressor.cli import main

if __name__ == "__main__":
    sys.exit(main())
