"""Columns of the layer table: one row of int64 per layer holds the sizes, strides and addresses that kernels read.

A table in memory instead of kernel arguments is what lets one launch serve any number of layers. Strides count
elements.
"""

import triton.language as tl

BATCH = tl.constexpr(0)  # B
INPUTS = tl.constexpr(1)  # K
OUTPUTS = tl.constexpr(2)  # N
REDUCED = tl.constexpr(3)  # columns of Δ that the activation tile multiplies by: K, or 0 for a frozen weight
X = tl.constexpr(4)  # [B, K] in the operands' dtype, zero-padded to whole tiles; XᵀX [K, K] in the Gram driver
X_STRIDE = tl.constexpr(5)
XT = tl.constexpr(6)  # [K, B] likewise, where the update tile wants it
XT_STRIDE = tl.constexpr(7)
A0 = tl.constexpr(8)  # [N, B], zero-padded, batch stride as E
E = tl.constexpr(9)  # [N, B] in the operands' dtype, zero-padded
E_STRIDE = tl.constexpr(10)
ROW_SUMS = tl.constexpr(11)  # partial sums of E over the batch [ROW_SUM_COUNT, N]; Σx [K] in the Gram driver
ROW_SUMS_STRIDE = tl.constexpr(12)
ROW_SUM_COUNT = tl.constexpr(13)
TRANSFER = tl.constexpr(14)  # index into the tuple of transfer functions
PARAMETER = tl.constexpr(15)  # the transfer function's parameter, float32 bits

WEIGHT = tl.constexpr(16)  # start of the weight's columns, below
BIAS = tl.constexpr(32)  # start of the bias' columns; a bias is a matrix [N, 1] to the epilogue

# Columns of a parameter, counted from WEIGHT or BIAS. GRAD = 0 says that it is frozen or absent.
DELTA = tl.constexpr(0)  # Δ, float32, zero-padded
STRIDE = tl.constexpr(1)  # row stride of DELTA, COPY and NEW; weights only
COPY = tl.constexpr(2)  # Δ in the operands' dtype; in the Gram driver two of them, and two float32 of δ
GRAD = tl.constexpr(3)
GRAD_ROW = tl.constexpr(4)
VALUE = tl.constexpr(5)  # the parameter itself
VALUE_ROW = tl.constexpr(6)
VALUE_COLUMN = tl.constexpr(7)
STEP = tl.constexpr(8)  # the rule's step counter, int64
OLD = tl.constexpr(9)  # three state slots as they were before the step, contiguous
NEW = tl.constexpr(12)  # their working copies
COPY_SIZE = tl.constexpr(15)  # elements of a copy

WEIGHT_STRIDE = tl.constexpr(17)  # WEIGHT + STRIDE
WEIGHT_COPY = tl.constexpr(18)
BIAS_COPY = tl.constexpr(34)

X_SOURCE = tl.constexpr(48)  # the caller's tensor, its two strides; 0 where X is read in place
A0_SOURCE = tl.constexpr(51)
AMAX = tl.constexpr(54)  # largest |Δ| of each update tile, three local steps of [n-blocks, k-blocks]
N_BLOCKS = tl.constexpr(55)
K_BLOCKS = tl.constexpr(56)
FIRST_BLOCK = tl.constexpr(57)  # number of n-blocks of the layers before
TRACE_ACTIVATION = tl.constexpr(58)  # the layer's first slot among a local step's partial sums
TRACE_UPDATE = tl.constexpr(59)
B_BLOCKS = tl.constexpr(60)
SCALE = tl.constexpr(61)  # of the matching loss: one over the number of examples, or 1; float32 bits
ROWS = tl.constexpr(62)  # B in the Gram driver, where BATCH is K
CHANGE = tl.constexpr(63)  # change of the pre-activations of a softmax layer [N, B], float32, strides as E
SPLITS = tl.constexpr(64)  # into how many parts the batch is cut in the products of update tiles
SPLIT_ROWS = tl.constexpr(65)  # examples of such a part
PARTIALS = tl.constexpr(66)  # the parts' products [SPLITS, N, K], float32, padded and with strides as DELTA

WIDTH = tl.constexpr(72)
