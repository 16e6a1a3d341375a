"""Arithmetic in bfloat16, which Triton's interpreter doesn't do: it holds such numbers as the integers that their bits
make, and would add and multiply those.
"""

import numpy as np


def calculate_in_bfloat16():
    """Let the interpreter calculate what is bfloat16 in float32, and round each result to the nearest bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    binary_op = InterpreterBuilder.binary_op

    def binary_op_with_bfloat16(builder, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            return binary_op(builder, lhs, rhs, op)
        wide = (TensorHandle(to_float32(operand.data), tl.float32) for operand in (lhs, rhs))
        result = binary_op(builder, *wide, op)
        return TensorHandle(to_bfloat16(result.data), tl.bfloat16) if result.data.dtype == np.float32 else result

    InterpreterBuilder.binary_op = binary_op_with_bfloat16


def to_float32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(numbers):
    bits = numbers.view(np.uint32)
    to_nearest_even = 0x7FFF + ((bits >> 16) & 1)
    return ((bits + to_nearest_even) >> 16).astype(np.uint16)
