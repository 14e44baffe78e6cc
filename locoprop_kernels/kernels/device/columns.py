"""Columns of the layer table: one row of int64 per layer holds the sizes, strides and addresses that kernels read.

A table in memory instead of kernel arguments is what lets one launch serve any number of layers. The groups of a layer
have a row each. Strides count elements.
"""

import triton.language as tl

BATCH = tl.constexpr(0)  # B
INPUTS = tl.constexpr(1)  # K
OUTPUTS = tl.constexpr(2)  # N
REDUCED = tl.constexpr(3)  # columns of Δ that the activation tile multiplies by: K, or 0 for a frozen weight
X = tl.constexpr(4)  # [B, K] in the operands' dtype, zero-padded to whole tiles; XᵀX [K, K] in the Gram form
X_STRIDE = tl.constexpr(5)
XT = tl.constexpr(6)  # [K, B] likewise, where the update tile wants it
XT_STRIDE = tl.constexpr(7)
A0 = tl.constexpr(8)  # [N, B], zero-padded, batch stride as E
E = tl.constexpr(9)  # [N, B] in the operands' dtype, zero-padded
E_STRIDE = tl.constexpr(10)
ROW_SUMS = tl.constexpr(11)  # partial sums of E over the batch [ROW_SUM_COUNT, N]; Σx [K] in the Gram form
ROW_SUMS_STRIDE = tl.constexpr(12)
ROW_SUM_COUNT = tl.constexpr(13)
TRANSFER = tl.constexpr(14)  # index into the tuple of transfer functions
PARAMETER = tl.constexpr(15)  # the transfer function's parameter, float32 bits
X_SOURCE = tl.constexpr(16)  # where X is copied from, and two strides; 0 where X is read in place
A0_SOURCE = tl.constexpr(19)
AMAX = tl.constexpr(22)  # largest |Δ| of each update tile, three local steps of [n-blocks, k-blocks]
N_BLOCKS = tl.constexpr(23)
K_BLOCKS = tl.constexpr(24)
B_BLOCKS = tl.constexpr(25)
FIRST_BLOCK = tl.constexpr(26)  # number of n-blocks in the rows before
TRACE_ACTIVATION = tl.constexpr(27)  # the row's first slot among a local step's partial sums
TRACE_UPDATE = tl.constexpr(28)
SCALE = tl.constexpr(29)  # of the matching loss: one over the number of examples, or 1; float32 bits
ROWS = tl.constexpr(30)  # B in the Gram form, where BATCH is K
CHANGE = tl.constexpr(31)  # change of the pre-activations of a softmax layer [N, B], float32, strides as E
SPLITS = tl.constexpr(32)  # into how many splits the batch is cut in the products of update tiles
SPLIT_ROWS = tl.constexpr(33)  # examples of such a split
PARTIALS = tl.constexpr(34)  # the splits' products [SPLITS, N, K], float32, padded and with strides as DELTA
GROUP = tl.constexpr(35)  # which group of its layer the row is
X_STEP = tl.constexpr(36)  # elements from one local step's X to the next, where each has rows of its own
A0_STEP = tl.constexpr(37)  # likewise of A0
SETS = tl.constexpr(38)  # how many times a local step's rows count, float32 bits
X_AMAX = tl.constexpr(39)  # largest |X|, one float32; with float8 operands
E_AMAX = tl.constexpr(40)  # largest |E| of each activation tile, three local steps of [n-blocks, b-blocks]; likewise

WEIGHT = tl.constexpr(42)  # start of the weight's columns, below
BIAS = tl.constexpr(66)  # start of the bias' columns; a bias is a matrix [N, 1] to the epilogue
WIDTH = tl.constexpr(90)

# Columns of a parameter, counted from WEIGHT or BIAS. GRAD = 0 says that it is frozen or absent.
DELTA = tl.constexpr(0)  # Δ, float32, zero-padded
STRIDE = tl.constexpr(1)  # row stride of DELTA, COPY and NEW; weights only
COPY = tl.constexpr(2)  # Δ in the operands' dtype; in the Gram form two of them, and two float32 of δ
COPY_SIZE = tl.constexpr(3)  # elements of a copy
GRAD = tl.constexpr(4)
GRAD_ROW = tl.constexpr(5)
VALUE = tl.constexpr(6)  # the parameter itself
VALUE_ROW = tl.constexpr(7)
VALUE_COLUMN = tl.constexpr(8)
STEP = tl.constexpr(9)  # the rule's step counter, int64, one for all groups
OLD = tl.constexpr(10)  # three state slots as they were before the step, contiguous
NEW = tl.constexpr(13)  # their working copies
MASK = tl.constexpr(16)  # a byte per element, 0 where it must not move, contiguous; 0 for no mask
RATE = tl.constexpr(17)  # factor of the learning rates, float32 bits
START = tl.constexpr(18)  # G_0 in float32, zero-padded, strides as DELTA
GRAD_SCALE = tl.constexpr(19)  # factor of GRAD, float32 bits

WEIGHT_STRIDE = tl.constexpr(WEIGHT.value + STRIDE.value)
WEIGHT_COPY = tl.constexpr(WEIGHT.value + COPY.value)
WEIGHT_COPY_SIZE = tl.constexpr(WEIGHT.value + COPY_SIZE.value)
BIAS_COPY = tl.constexpr(BIAS.value + COPY.value)
BIAS_COPY_SIZE = tl.constexpr(BIAS.value + COPY_SIZE.value)
