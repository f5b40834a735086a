"""The command line with the stand-in network under Xception's name, for tests that need a process of their own."""

import os
import sys
from pathlib import Path

repository = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(repository))
sys.path.insert(0, str(repository / "tests"))

from tiny_networks import stand_in  # noqa: E402

from compressor.cli import main  # noqa: E402

if __name__ == "__main__":
    with stand_in(retrain=bool(os.environ.get("STAND_IN_RETRAIN"))):
        sys.exit(main())
