"""Name what is on images with the network beside this file:

    pip install openvino numpy pillow
    python predict.py IMAGE [IMAGE ...]

The network takes 8-bit RGB of any size; resizing and normalisation are inside it.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # nothing is sent anywhere
import openvino as ov

HERE = Path(__file__).resolve().parent
BEST = 3


def main(paths: list[str]) -> None:
    labels = (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()
    network = ov.Core().compile_model(HERE / "model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        logits = network(pixels[None])[0][0]
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        named = [f"{labels[i]} {100 * shares[i]:.1f} %" for i in np.argsort(-shares)[:BEST]]
        print(f"{path}: {', '.join(named)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
