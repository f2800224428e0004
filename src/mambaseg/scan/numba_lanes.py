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

# 2**f on [0, 1], relative error 2e-9; exact at both ends, so that decays close to 1 have no bias.
_EXP2 = (
    1.0,
    0.6931470324000212,
    0.24022951329206346,
    0.05548415245928682,
    0.00967806389364339,
    0.001244087702687545,
    0.00021715025229760443,
)


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


def _has_avx512(context: Any) -> bool:
    _, _, features = context.codegen().magic_tuple()
    return "+avx512dq" in features.split(",")


def _call_avx512(builder: Any, name: str, *arguments: Any) -> Any:
    """Call an AVX-512 instruction on all 16 lanes."""
    # What masked lanes would hold, no lane masked, and the rounding mode that is set (4).
    rest = (arguments[0], ir.Constant(ir.IntType(16), -1), ir.Constant(ir.IntType(32), 4))
    operands = (*arguments, *rest)
    kind = ir.FunctionType(_VECTOR, [operand.type for operand in operands])
    function = builder.module.declare_intrinsic(f"llvm.x86.avx512.mask.{name}.ps.512", (), kind)
    return builder.call(function, operands)


def _polynomial(builder: Any, fraction: Any) -> Any:
    power = _constant(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        product = builder.fmul(power, fraction, flags=_FAST)
        power = builder.fadd(product, _constant(coefficient), flags=_FAST)
    return power


@intrinsic
def exp2(typing: Any, exponent: Any) -> Any:
    """2**x to single precision: infinity from 128 up, NaN for NaN; zero from -127 or -150 down."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, (x,) = builder, arguments
        if _has_avx512(context):  # two instructions for eight
            floor_and_silent = ir.Constant(ir.IntType(32), 0b1001)
            fraction = _call_avx512(b, "reduce", x, floor_and_silent)
            return _call_avx512(b, "scalef", _polynomial(b, fraction), x)
        x = b.select(b.fcmp_ordered("<", x, _constant(-127.0)), _constant(-127.0), x)
        x = b.select(b.fcmp_ordered(">", x, _constant(128.0)), _constant(128.0), x)
        floor = ir.FunctionType(_VECTOR, [_VECTOR])
        whole = b.call(b.module.declare_intrinsic(f"llvm.floor.v{LANES}f32", (), floor), [x])
        power = _polynomial(b, b.fsub(x, whole))
        exponent = b.add(b.fptosi(whole, _BITS), ir.Constant(_BITS, [127] * LANES))
        scale = b.bitcast(b.shl(exponent, ir.Constant(_BITS, [23] * LANES)), _VECTOR)
        return b.fmul(power, scale)

    return _lanes(_lanes), codegen


@intrinsic
def sum_rows(typing: Any, array: Any, offset: Any) -> Any:
    """Sums of the 16 rows of a 16 x 16 tile: lane i holds the sum of row i.

    Four rounds; each folds two rows by half and packs them into one: the lower lanes of a run
    belong to the first of the two, the upper to the second.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = arguments[1]
        rows = []
        for row in range(LANES):
            offset = builder.add(base, ir.Constant(base.type, row * LANES))
            address = _address(context, builder, signature.args[0], arguments[0], offset)
            rows.append(builder.load(address, align=4))
        while len(rows) > 1:
            half = len(rows) // 2
            upper = [lane & half for lane in range(LANES)]
            # Lane by lane from the row it stays in, and from the other half of that run.
            stay = [lane + LANES if upper[lane] else lane for lane in range(LANES)]
            come = [lane + LANES - half if upper[lane] else lane + half for lane in range(LANES)]
            rows = [
                builder.fadd(
                    builder.shuffle_vector(first, second, ir.Constant(_BITS, stay)),
                    builder.shuffle_vector(first, second, ir.Constant(_BITS, come)),
                )
                for first, second in zip(rows[:half], rows[half:], strict=True)
            ]
        return rows[0]

    return _lanes(array, types.intp), codegen


@njit
def softplus_and_slope(z: Any) -> tuple[Any, Any]:
    """log(1 + exp(z)) and its derivative, both accurate to single precision in both tails."""
    zero, one, two = splat(np.float32(0.0)), splat(np.float32(1.0)), splat(np.float32(2.0))
    w = exp2(if_negative(z, z, zero - z) * splat(LOG2_E))  # exp(-|z|), in (0, 1]
    quotient = one / ((one + w) * (two + w))  # divisions are slow: one for both
    # log(1 + w) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = w / (2 + w) <= 1/3
    s = w * (one + w) * quotient
    square = s * s
    series = splat(np.float32(2.0 / 15.0))
    series = series * square + splat(np.float32(2.0 / 13.0))
    series = series * square + splat(np.float32(2.0 / 11.0))
    series = series * square + splat(np.float32(2.0 / 9.0))
    series = series * square + splat(np.float32(2.0 / 7.0))
    series = series * square + splat(np.float32(2.0 / 5.0))
    series = series * square + splat(np.float32(2.0 / 3.0))
    series = series * square + two
    softplus = if_negative(z, zero, z) + s * series
    slope = if_negative(z, w, one) * (two + w) * quotient
    return softplus, slope


@njit
def empty_rows(rows: int) -> Any:
    """Uninitialised memory for rows of 16 numbers, none of which straddles two cache lines."""
    memory = np.empty((rows + 1) * LANES, np.float32)
    past = (memory.ctypes.data // np.uint64(4)) % LANES
    first = (LANES - past) % LANES
    return memory[first : first + rows * LANES].reshape(rows, LANES)
