"""Float32 numbers in registers as a number type for compiled loops ("lanes").

The channels of a scan are independent of each other, so as many as fill a register (`LANES`) are
computed at once; several states of them, side by side in registers of their own, are one longer
vector. With a type of its own for them the loops are vectors by construction, whatever a compiler's
vectoriser would have made of them; LLVM splits a vector into registers.

Where the length of a vector does not follow from an argument, the loops hand down `many`: a tuple
whose length, which a compiler knows, is the number of states per vector.
"""

import operator
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_model,
    type_callable,
)


def numbers_per_register(features: str) -> int:
    """How many float32 numbers the registers of a processor with LLVM's features hold."""
    present = set(features.split(","))
    return 16 if "+avx512f" in present else 8 if "+avx2" in present else 4


# What numba compiles for; `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` may have a say.
LANES = numbers_per_register(cpu_target.target_context.codegen().magic_tuple()[2])
LOG2_E = np.float32(np.log2(np.e))
LEAST = np.float32(120.0)
"""Decays end at 2**-LEAST: nothing beside what a state takes in, and far from denormal numbers."""

_FAST = ("contract", "nsz", "arcp")  # not nnan, ninf: a NaN has to come out as a NaN

# 2**f on [-1/2, 1/2], relative error 1.1e-7; exact at 0, so that decays close to 1 have no bias.
_EXP2 = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)
_ROUND = 1.5 * 2**23
"""A number added to this is rounded to an integer, which then is in the lowest bits."""


class _LanesType(types.Type):
    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"Lanes{count}f")


@lru_cache
def _lanes(count: int) -> _LanesType:
    return _LanesType(count)


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _vector(fe_type.count))


def _vector(count: int) -> ir.VectorType:
    return ir.VectorType(ir.FloatType(), count)


def _bits(values: Any) -> ir.Constant:
    values = list(values)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(values)), values)


def _constant(value: float, count: int) -> ir.Constant:
    return ir.Constant(_vector(count), [float(np.float32(value))] * count)


def _define_operator(op: Any, instruction: str) -> None:
    @type_callable(op)
    def _type(context: Any) -> Any:
        def typer(left: Any, right: Any) -> Any:
            return left if isinstance(left, _LanesType) and left == right else None

        return typer

    @lower_builtin(op, _LanesType, _LanesType)
    def _lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return getattr(builder, instruction)(*arguments, flags=_FAST)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")

# ------------------------------------------------------------------ between memory and registers


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def _load(builder: Any, pointer: Any, count: int) -> Any:
    return builder.load(builder.bitcast(pointer, _vector(count).as_pointer()), align=4)


def _store(builder: Any, pointer: Any, vector: Any) -> None:
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)


@intrinsic
def load_states(typing: Any, array: Any, offset: Any, many: Any) -> Any:
    """The vectors of LANES numbers of `many` states from an offset on, counted in numbers."""
    count = many.count * LANES

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, _pointer(context, builder, array, *arguments[:2]), count)

    return _lanes(count)(array, types.intp, many), codegen


@intrinsic
def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write a vector to a contiguous array, from an offset on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store(builder, _pointer(context, builder, array, *arguments[:2]), arguments[2])

    return types.void(array, types.intp, value), codegen


@intrinsic
def prefetch(typing: Any, array: Any, offset: Any) -> Any:
    """Ask for the line of an element that is wanted soon, in the second-level cache.

    Rows of an image can be a multiple of 4096 bytes apart; the first level would not hold a column.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        pointer = builder.bitcast(_pointer(context, builder, array, *arguments), byte)
        builder.call(function, [pointer, *(ir.Constant(number, n) for n in (0, 2, 1))])

    return types.void(array, types.intp), codegen


@intrinsic
def transpose(
    typing: Any, source: Any, start: Any, step: Any, target: Any, at: Any, stride: Any
) -> Any:
    """Copy a square of LANES x LANES numbers, transposed: rows `step` apart to rows `stride` apart.

    Each round exchanges squares of half the size off the diagonal.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, apart, out, first_out, apart_out = arguments

        def row(kind: Any, array: Any, first: Any, apart: Any, i: int) -> Any:
            offset = builder.add(first, builder.mul(apart, ir.Constant(apart.type, i)))
            return _pointer(context, builder, kind, array, offset)

        rows = [_load(builder, row(source, array, first, apart, i), LANES) for i in range(LANES)]
        half = LANES // 2
        while half:
            for i in (i for i in range(LANES) if not i & half):
                a, b = rows[i], rows[i + half]
                upper = [lane + LANES - half if lane & half else lane for lane in range(LANES)]
                lower = [lane + LANES if lane & half else lane + half for lane in range(LANES)]
                rows[i] = builder.shuffle_vector(a, b, _bits(upper))
                rows[i + half] = builder.shuffle_vector(a, b, _bits(lower))
            half //= 2
        for i, vector in enumerate(rows):
            _store(builder, row(target, out, first_out, apart_out, i), vector)

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), codegen


# ------------------------------------------------------------------ within registers


def _repeat(builder: Any, value: Any, times: int) -> Any:
    lanes = range(value.type.count)
    return builder.shuffle_vector(value, value, _bits(list(lanes) * times))


def _parts(builder: Any, value: Any, size: int) -> list[Any]:
    """Cut a vector into vectors of some size."""
    count = value.type.count
    return [
        builder.shuffle_vector(value, value, _bits(range(first, first + size)))
        for first in range(0, count, size)
    ]


def _join(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        mask = _bits(range(2 * parts[0].type.count))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(a, b, mask) for a, b in pairs]
    return parts[0]


def _splat(builder: Any, number: Any, count: int) -> Any:
    undefined = ir.Constant(_vector(count), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, _bits([0] * count))


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """One number in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0], LANES)

    return _lanes(LANES)(types.float32), codegen


@intrinsic
def splat_states(typing: Any, array: Any, offset: Any, many: Any) -> Any:
    """The numbers of `many` states from an offset on, each in all lanes of its state."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments[:2])
        numbers = (
            builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(64), i)]))
            for i in range(many.count)
        )
        return _join(builder, [_splat(builder, number, LANES) for number in numbers])

    return _lanes(many.count * LANES)(array, types.intp, many), codegen


@intrinsic
def repeat(typing: Any, value: Any, many: Any) -> Any:
    """The same LANES numbers for each of `many` states."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeat(builder, arguments[0], many.count)

    return _lanes(many.count * LANES)(value, many), codegen


@intrinsic
def sum_states(typing: Any, value: Any) -> Any:
    """The sum over the states, lane by lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parts = _parts(builder, arguments[0], LANES)
        while len(parts) > 1:
            half = len(parts) // 2
            pairs = zip(parts[:half], parts[half:], strict=True)
            parts = [builder.fadd(a, b, flags=_FAST) for a, b in pairs]
        return parts[0]

    return _lanes(LANES)(value), codegen


@intrinsic
def add_sums_over_lanes(
    typing: Any, array: Any, offset: Any, value: Any, other: Any, at: Any, more: Any
) -> Any:
    """Add the sum over the lanes of each state of `value` to `array`, and of `more` to `other`.

    In each round two rows become one: lanes with a bit of their number clear belong to the first,
    lanes with that bit set to the second. In the end lane i belongs to row i.
    """
    states = value.count // LANES

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = [*_parts(builder, arguments[2], LANES), *_parts(builder, arguments[5], LANES)]
        bit = 1
        while bit < LANES and len(rows) > 1:
            stay = [lane + LANES if lane & bit else lane for lane in range(LANES)]
            come = [(lane ^ bit) + (LANES if lane & bit else 0) for lane in range(LANES)]
            rows = [
                builder.fadd(
                    builder.shuffle_vector(a, b, _bits(stay)),
                    builder.shuffle_vector(a, b, _bits(come)),
                )
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
            bit *= 2
        sums = _join(builder, rows)
        while sums.type.count > 2 * states:
            sums = builder.fadd(*_parts(builder, sums, sums.type.count // 2))
        for which, part in zip((0, 3), _parts(builder, sums, states), strict=True):
            kind = signature.args[which]
            pointer = _pointer(context, builder, kind, arguments[which], arguments[which + 1])
            _store(builder, pointer, builder.fadd(_load(builder, pointer, states), part))

    return types.void(array, types.intp, value, other, types.intp, more), codegen


@intrinsic
def if_negative(typing: Any, condition: Any, then: Any, otherwise: Any) -> Any:
    """Choose by lane; a NaN is not negative."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        negative = builder.fcmp_ordered("<", arguments[0], _constant(0.0, condition.count))
        return builder.select(negative, arguments[1], arguments[2])

    return condition(condition, then, otherwise), codegen


@intrinsic
def exp2_of_product(typing: Any, step: Any, rate: Any, limit: Any) -> Any:
    """2**(step rate), where a step beyond `limit` counts as `limit`; NaN for NaN.

    With |limit rate| <= LEAST neither the scale nor a power leaves the normal numbers, so a
    positive exponent ends at LEAST. Twelve operations: the minimum and the product; an addition and
    two subtractions that cut the exponent into an integer and a fraction in [-1/2, 1/2]; five
    multiply-adds for the power of the fraction; the integer shifted and added to its bits.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, (step, rate, limit) = builder, arguments
        count = step.type.count
        bits = ir.VectorType(ir.IntType(32), count)
        magic = _constant(_ROUND, count)
        step = b.select(b.fcmp_ordered("<", limit, step), limit, step)
        shifted = b.fadd(b.fmul(step, rate, flags=_FAST), magic, flags=_FAST)
        whole = b.fsub(shifted, magic, flags=("nsz",))
        fraction = b.fsub(b.fmul(step, rate, flags=_FAST), whole, flags=_FAST)
        power = _constant(_EXP2[-1], count)
        for coefficient in reversed(_EXP2[:-1]):
            product = b.fmul(power, fraction, flags=_FAST)
            power = b.fadd(product, _constant(coefficient, count), flags=_FAST)
        exponent = b.shl(b.bitcast(shifted, bits), _bits([23] * count))
        return b.bitcast(b.add(b.bitcast(power, bits), exponent), step.type)

    return step(step, rate, limit), codegen


@njit
def softplus_and_slope(z: Any) -> tuple[Any, Any]:
    """log(1 + exp(z)) and its derivative, both accurate to single precision in both tails."""
    zero, one, two = splat(np.float32(0.0)), splat(np.float32(1.0)), splat(np.float32(2.0))
    size = if_negative(z, zero - z, z)
    w = exp2_of_product(size, splat(-LOG2_E), splat(LEAST / LOG2_E))  # exp(-|z|), in (0, 1]
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
    """Uninitialised memory for rows of LANES numbers, none of which straddles two cache lines."""
    memory = np.empty((rows + 1) * LANES, np.float32)
    past = (memory.ctypes.data // np.uint64(4)) % LANES
    first = (LANES - past) % LANES
    return memory[first : first + rows * LANES].reshape(rows, LANES)
