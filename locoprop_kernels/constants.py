"""Numbers that the transfer functions need in PyTorch and in Triton alike."""

from __future__ import annotations

import numpy as np

__all__ = ["DILOGARITHM_SERIES", "QUADRATURE_NODES", "QUADRATURE_WEIGHTS", "SELU_ALPHA", "SELU_SCALE"]

DILOGARITHM_SERIES = (
    2.777777777777778e-02,
    -2.7777777777777778e-04,
    4.72411186696901e-06,
    -9.185773074661964e-08,
    1.8978869988971e-09,
    -4.0647616451442256e-11,
    8.921691020456452e-13,
    -1.9939295860721074e-14,
)
"""Bernoulli numbers over factorials, ``B_n / (n + 1)!``, for even ``n``: ``Li2(1 - e^x) = sum_n B_n (-x)^(n+1) /
(n+1)!``."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
QUADRATURE_NODES = tuple(float(node) for node in (_NODES + 1) / 2)
"""Nodes of the Gauss-Legendre quadrature on ``[0, 1]``, for potentials without a closed form."""
QUADRATURE_WEIGHTS = tuple(float(weight) for weight in _WEIGHTS / 2)
"""The weights that go with them."""

SELU_ALPHA = 1.6732632423543772
"""``α`` of the SELU, from self-normalising networks (Klambauer et al., 2017), with torch's digits."""
SELU_SCALE = 1.0507009873554805
"""``λ`` of the SELU, by which it multiplies, from the same paper, with torch's digits."""
