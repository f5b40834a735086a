"""The command line with the stand-in network under Xception's name, for tests that need a process of their own."""

import sys
from pathlib import Path

repository = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(repository))
sys.path.insert(0, str(repository / "tests"))

from tiny_networks import tiny  # noqa: E402

from compressor import models, proof  # noqa: E402
from compressor.cli import main  # noqa: E402

models.BUILTIN["xception"] = tiny
# The child that measures retraining would build the real Xception.
proof._retrain_memory = lambda *_: {"error": "the stand-in network has no retraining process"}

if __name__ == "__main__":
    sys.exit(main())
