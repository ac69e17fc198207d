"""LLVM code for float16 and bfloat16 vectors whose bits travel as 16-bit integers.

bfloat16 is the upper half of a float32. float16 is converted by the processor where it can (F16C, on x86);
elsewhere by integer arithmetic, since LLVM would call a function of the C runtime that a process may not
have. Either way: exact into float32; out of it, rounded to nearest, ties to even, beyond the largest value to
infinity, NaN to NaN.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

LANES = 16
V_FLOAT = ir.VectorType(ir.FloatType(), LANES)
V_HALF = ir.VectorType(ir.HalfType(), LANES)
V_I16 = ir.VectorType(ir.IntType(16), LANES)
V_I32 = ir.VectorType(ir.IntType(32), LANES)


def to_float(context: Any, builder: ir.IRBuilder, tag: types.Type, raw: ir.Value) -> ir.Value:
    """Return float32 lanes of raw lanes of a tag's element type."""
    if tag == types.float32:
        return raw
    if tag == types.int16:
        wide = builder.shl(builder.zext(raw, V_I32), _all(16))
        return builder.bitcast(wide, V_FLOAT)
    if _converts_half(context):
        return builder.fpext(builder.bitcast(raw, V_HALF), V_FLOAT)
    return _half_to_float(builder, builder.zext(raw, V_I32))


def from_float(context: Any, builder: ir.IRBuilder, tag: types.Type, value: ir.Value) -> ir.Value:
    """Return raw lanes of a tag's element type of float32 lanes, rounded to nearest, ties to even."""
    if tag == types.float32:
        return value
    if tag == types.int16:
        return builder.trunc(_float_to_bfloat(builder, builder.bitcast(value, V_I32)), V_I16)
    if _converts_half(context):
        return builder.bitcast(builder.fptrunc(value, V_HALF), V_I16)
    return builder.trunc(_float_to_half(builder, builder.bitcast(value, V_I32)), V_I16)


def _converts_half(context: Any) -> bool:
    # Whether the processor that the code is made for has F16C; numba's cache tells processors apart by the same string.
    features: str = context.codegen().magic_tuple()[2]
    return "+f16c" in features.split(",")


def _half_to_float(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    # Exponent and fraction move up by 13 bits, and a multiplication by 2**112 mends the exponent's bias, which is
    # right for subnormal values too. Infinity and NaN then get the largest exponent.
    body = builder.shl(builder.and_(bits, _all(0x7FFF)), _all(13))
    scaled = builder.fmul(builder.bitcast(body, V_FLOAT), _all_floats(2.0**112))
    magnitude = builder.bitcast(scaled, V_I32)
    special = builder.icmp_unsigned(">=", body, _all(0x7C00 << 13))
    magnitude = builder.select(special, builder.or_(body, _all(0x7F800000)), magnitude)
    sign = builder.shl(builder.and_(bits, _all(0x8000)), _all(16))
    return builder.bitcast(builder.or_(magnitude, sign), V_FLOAT)


def _float_to_half(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    magnitude = builder.and_(bits, _all(0x7FFFFFFF))
    # Normal values: the exponent's bias changes by 112, and half a unit (less one if the result is even) rounds.
    odd = builder.and_(builder.lshr(magnitude, _all(13)), _all(1))
    shifted = builder.add(builder.sub(magnitude, _all(112 << 23)), builder.add(odd, _all(0xFFF)))
    result = builder.lshr(shifted, _all(13))
    # Below 2**-14 the result is subnormal: adding 0.5 lets the float32 addition round at 2**-24.
    added = builder.fadd(builder.bitcast(magnitude, V_FLOAT), _all_floats(0.5))
    subnormal = builder.sub(builder.bitcast(added, V_I32), _all(0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", magnitude, _all(113 << 23)), subnormal, result)
    # From 65520 on the nearest is infinity, which the rounding above reaches by itself up to 65536.
    result = builder.select(builder.icmp_unsigned(">=", magnitude, _all(143 << 23)), _all(0x7C00), result)
    result = builder.select(builder.icmp_unsigned(">", magnitude, _all(0x7F800000)), _all(0x7E00), result)
    return builder.or_(result, builder.and_(builder.lshr(bits, _all(16)), _all(0x8000)))


def _float_to_bfloat(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    upper = builder.lshr(bits, _all(16))
    odd = builder.and_(upper, _all(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _all(0x7FFF))), _all(16))
    magnitude = builder.and_(bits, _all(0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, _all(0x7F800000))
    return builder.select(is_nan, builder.or_(upper, _all(0x40)), rounded)


def _all(value: int) -> ir.Constant:
    return ir.Constant(V_I32, [value] * LANES)


def _all_floats(value: float) -> ir.Constant:
    return ir.Constant(V_FLOAT, [value] * LANES)
