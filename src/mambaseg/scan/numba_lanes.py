"""Sixteen float32 numbers in a register, as a number type for compiled loops ("lanes").

The channels of a scan are independent of each other, so 16 of them are computed at once. With a
type of its own for them the loops are vectors by construction, whatever a compiler's vectoriser
would have made of them; LLVM turns one into as many registers as the machine needs.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import njit, types
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_model,
    type_callable,
)

LANES = 16
LOG2_E = np.float32(np.log2(np.e))

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_BITS = ir.VectorType(ir.IntType(32), LANES)
_FAST = ("contract", "nsz", "arcp")  # not nnan, ninf: a NaN has to come out as a NaN

# Minimax polynomial of 2**f on [-1/2, 1/2], relative error 2e-9.
_EXP2 = (
    1.0000000005541676, 0.6931472057372658, 0.24022646890627686, 0.05550328776969677,
    0.009618488957813975, 0.001339993121774536, 0.00015345811814777843,
)  # fmt: skip
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the lowest bits


class _LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes16f")


_lanes = _LanesType()


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(np.float32(value))] * LANES)


def _define_operator(op: Any, instruction: str) -> None:
    @type_callable(op)
    def _type(context: Any) -> Any:
        def typer(left: Any, right: Any) -> Any:
            return _lanes if left is _lanes and right is _lanes else None

        return typer

    @lower_builtin(op, _LanesType, _LanesType)
    def _lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return getattr(builder, instruction)(*arguments, flags=_FAST)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())


@intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    """The 16 numbers that start at an offset, counted in numbers, of a contiguous array."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        return builder.load(address, align=4)

    return _lanes(array, types.intp), codegen


@intrinsic
def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write 16 numbers from an offset on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], address, align=4)

    return types.void(array, types.intp, _lanes), codegen


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """One number in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(
            ir.Constant(_VECTOR, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0)
        )
        zeros = ir.Constant(_BITS, [0] * LANES)
        return builder.shuffle_vector(first, first, zeros)

    return _lanes(types.float32), codegen


@intrinsic
def if_negative(typing: Any, condition: Any, then: Any, otherwise: Any) -> Any:
    """Choose by lane; a NaN is not negative."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        negative = builder.fcmp_ordered("<", arguments[0], _constant(0.0))
        return builder.select(negative, arguments[1], arguments[2])

    return _lanes(_lanes, _lanes, _lanes), codegen


@intrinsic
def exp2(typing: Any, exponent: Any) -> Any:
    """2**x to single precision: 0 from x = -127 down, infinity from 128 up, NaN for NaN."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, (x,) = builder, arguments
        x = b.select(b.fcmp_ordered("<", x, _constant(-127.0)), _constant(-127.0), x)
        x = b.select(b.fcmp_ordered(">", x, _constant(128.0)), _constant(128.0), x)
        shifted = b.fadd(x, _constant(_ROUND))  # without flags: these must not be reordered
        fraction = b.fsub(x, b.fsub(shifted, _constant(_ROUND)))
        power = _constant(_EXP2[-1])
        for coefficient in reversed(_EXP2[:-1]):
            power = b.fadd(
                b.fmul(power, fraction, flags=_FAST), _constant(coefficient), flags=_FAST
            )
        integer = b.bitcast(shifted, _BITS)
        exponent_bits = b.shl(
            b.add(integer, ir.Constant(_BITS, [127] * LANES)), ir.Constant(_BITS, [23] * LANES)
        )
        return b.fmul(power, b.bitcast(exponent_bits, _VECTOR))

    return _lanes(_lanes), codegen


@intrinsic
def sum_rows(typing: Any, array: Any, offset: Any) -> Any:
    """Sums of the 16 rows of a 16 x 16 tile: lane i holds the sum of row i.

    Four rounds; each adds up halves of the lanes of two rows and packs both results into one.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = arguments[1]
        rows = []
        for row in range(LANES):
            offset = builder.add(base, ir.Constant(base.type, row * LANES))
            address = _address(context, builder, signature.args[0], arguments[0], offset)
            rows.append(builder.load(address, align=4))
        width = LANES
        while len(rows) > 1:
            width //= 2
            # Lanes come in runs of 2 * width that belong to one row; fold each run in half.
            starts = range(0, LANES, 2 * width)
            low = [r + s + i for s in starts for r in (0, LANES) for i in range(width)]
            high = [lane + width for lane in low]
            half = len(rows) // 2
            rows = [
                builder.fadd(
                    builder.shuffle_vector(first, second, ir.Constant(_BITS, low)),
                    builder.shuffle_vector(first, second, ir.Constant(_BITS, high)),
                )
                for first, second in zip(rows[:half], rows[half:], strict=True)
            ]
        return rows[0]

    return _lanes(array, types.intp), codegen


@njit
def softplus_and_slope(z: Any) -> tuple[Any, Any]:
    """log(1 + exp(z)) and its derivative, both accurate to single precision in both tails."""
    zero = splat(np.float32(0.0))
    one = splat(np.float32(1.0))
    magnitude = if_negative(z, zero - z, z)
    w = exp2(magnitude * splat(-LOG2_E))  # exp(-|z|), in (0, 1]
    # log(1 + w) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = w / (2 + w) <= 1/3
    s = w / (splat(np.float32(2.0)) + w)
    square = s * s
    series = splat(np.float32(2.0 / 15.0))
    series = series * square + splat(np.float32(2.0 / 13.0))
    series = series * square + splat(np.float32(2.0 / 11.0))
    series = series * square + splat(np.float32(2.0 / 9.0))
    series = series * square + splat(np.float32(2.0 / 7.0))
    series = series * square + splat(np.float32(2.0 / 5.0))
    series = series * square + splat(np.float32(2.0 / 3.0))
    series = series * square + splat(np.float32(2.0))
    softplus = if_negative(z, zero, z) + s * series
    slope = if_negative(z, w, one) / (one + w)
    return softplus, slope
