"""`python -m compressor.retrain` with the stand-in network under Xception's name, for tests of the child process."""

import json
import sys
from pathlib import Path

repository = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(repository))
sys.path.insert(0, str(repository / "tests"))

from tiny_networks import stand_in  # noqa: E402

from compressor.retrain import retrain  # noqa: E402

if __name__ == "__main__":
    run, stage_folder, index, steps, precision, levers = sys.argv[1:]
    with stand_in():
        told = json.loads(levers)
        print(json.dumps(retrain(Path(run), Path(stage_folder), int(index), int(steps), precision, told)))
