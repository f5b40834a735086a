"""Adaptive average pooling to any size as ONNX, which torch's exporter writes only where the sizes divide (torch 2.13).

Invariant: outside the block the exporter is as it was; inside, what it can write itself it writes itself.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_OPERATOR = "aten::adaptive_avg_pool2d"


@contextlib.contextmanager
def any_adaptive_pooling(opset: int) -> Iterator[None]:
    """While the block runs, `adaptive_avg_pool2d` to sizes that do not divide becomes two products with constants."""
    from torch.onnx import symbolic_helper, symbolic_opset9

    # These names exist without being exported (torch 2.13).
    exporter: Any = torch.onnx
    ready: Any = symbolic_opset9

    def write(g: Any, x: Any, size: Any) -> Any:
        sides = symbolic_helper._get_tensor_sizes(x)
        wanted = symbolic_helper._parse_arg(size, "is")
        plain = sides is None or None in sides[2:] or all(a % b == 0 for a, b in zip(sides[2:], wanted, strict=True))
        if plain:
            return ready.adaptive_avg_pool2d(g, x, size)
        rows, columns = (pooling_matrix(a, b) for a, b in zip(sides[2:], wanted, strict=True))
        down = g.op("MatMul", g.op("Constant", value_t=torch.from_numpy(rows)), x)
        return g.op("MatMul", down, g.op("Constant", value_t=torch.from_numpy(columns.T.copy())))

    exporter.register_custom_op_symbolic(_OPERATOR, write, opset)
    try:
        yield
    finally:
        exporter.unregister_custom_op_symbolic(_OPERATOR, opset)


def pooling_matrix(length: int, wanted: int) -> NDArray[np.float32]:
    """Weights (wanted, length) of adaptive average pooling along one axis, as torch defines its windows."""
    matrix = np.zeros((wanted, length), np.float32)
    for row in range(wanted):
        start, end = row * length // wanted, -(-(row + 1) * length // wanted)
        matrix[row, start:end] = 1 / (end - start)
    return matrix
