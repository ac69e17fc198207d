"""Vectors of 16 lanes for the compiled kernels, as numba intrinsics over LLVM's vector types.

Why not leave it to the compiler: it vectorizes a sum only under flags that allow any order, so that the bits
of a result would depend on the machine. Here a lane is a lane on every processor: LLVM maps 16 lanes to
what there is (one AVX-512 register, two of AVX2, four of SSE or NEON), and nothing is reassociated or
contracted.

Memory is addressed by an integer, the address, and an index in elements. Bounds are not checked, and no
alignment is assumed. The type of a `tag` says what the elements are: float32 for float32, uint16 for
float16 and int16 for bfloat16, whose bits travel as integers.

numba's cache watches the file that holds a kernel and not this one: see `MADE_OF` in `forward`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from sharednorm.arithmetic.numba.half import LANES, V_FLOAT, V_I32, from_float, to_float

FLOAT, DOUBLE, I16, I32 = ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.IntType(32)
V_DOUBLE = ir.VectorType(DOUBLE, LANES)
V_MASK = ir.VectorType(ir.IntType(1), LANES)

# The element in memory of each tag, as LLVM knows it, its name there, and its bytes.
STORED = {types.float32: (FLOAT, "f32", 4), types.uint16: (I16, "i16", 2), types.int16: (I16, "i16", 2)}


class Vector16(types.Type):
    """numba's type of a vector: 16 lanes of float32 or float64."""

    def __init__(self, lane: types.Type) -> None:
        self.lane = lane
        super().__init__(name=f"Vector16({lane})")


@register_model(Vector16)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector16) -> None:
        super().__init__(manager, kind, V_FLOAT if kind.lane == types.float32 else V_DOUBLE)


F32, F64 = Vector16(types.float32), Vector16(types.float64)


@intrinsic
def load(_typing: Any, tag: Any, address: Any, index: Any) -> Any:
    """Return the 16 elements from an index on, as float32."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        raw = builder.load(_pointer(builder, tag, args[1], args[2]))
        raw.align = 1
        return to_float(context, builder, tag, raw)

    return F32(tag, address, index), generate


@intrinsic
def load_part(_typing: Any, tag: Any, address: Any, index: Any, count: Any) -> Any:
    """Return the first `count` (0 to 16) of the elements from an index on, as float32; 0 in the other lanes."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        element, name, _ = STORED[tag]
        kind = ir.VectorType(element, LANES)
        shape = ir.FunctionType(kind, [kind.as_pointer(), I32, V_MASK, kind])
        function = _declared(builder, f"llvm.masked.load.v16{name}.p0v16{name}", shape)
        zeros = ir.Constant(kind, [0] * LANES)
        pointer = _pointer(builder, tag, args[1], args[2])
        raw = builder.call(function, [pointer, ir.Constant(I32, 1), _mask(builder, args[3]), zeros])
        return to_float(context, builder, tag, raw)

    return F32(tag, address, index, count), generate


@intrinsic
def store(_typing: Any, tag: Any, address: Any, index: Any, value: Any) -> Any:
    """Store 16 float32 lanes as elements from an index on."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        raw = from_float(context, builder, tag, args[3])
        builder.store(raw, _pointer(builder, tag, args[1], args[2])).align = 1
        return context.get_dummy_value()

    return types.none(tag, address, index, value), generate


@intrinsic
def stream(_typing: Any, tag: Any, address: Any, index: Any, value: Any) -> Any:
    """Store 16 lanes past the caches; the element must be aligned to the 16 elements' bytes."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        raw = from_float(context, builder, tag, args[3])
        instruction = builder.store(raw, _pointer(builder, tag, args[1], args[2]))
        instruction.align = LANES * STORED[tag][2]
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.none(tag, address, index, value), generate


@intrinsic
def store_part(_typing: Any, tag: Any, address: Any, index: Any, count: Any, value: Any) -> Any:
    """Store the first `count` (0 to 16) lanes."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        element, name, _ = STORED[tag]
        kind = ir.VectorType(element, LANES)
        shape = ir.FunctionType(ir.VoidType(), [kind, kind.as_pointer(), I32, V_MASK])
        function = _declared(builder, f"llvm.masked.store.v16{name}.p0v16{name}", shape)
        raw = from_float(context, builder, tag, args[4])
        pointer = _pointer(builder, tag, args[1], args[2])
        builder.call(function, [raw, pointer, ir.Constant(I32, 1), _mask(builder, args[3])])
        return context.get_dummy_value()

    return types.none(tag, address, index, count, value), generate


@intrinsic
def width(_typing: Any, tag: Any) -> Any:
    """Return the bytes of an element."""

    def generate(_context: Any, _builder: ir.IRBuilder, _signature: Any, _args: Any) -> ir.Value:
        return ir.Constant(ir.IntType(64), STORED[tag][2])

    return types.int64(tag), generate


@intrinsic
def load_lanes(_typing: Any, array: Any, index: Any) -> Any:
    """Return the 16 values from an index on of a contiguous float64 array."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        loaded = builder.load(_pointer_into(context, builder, signature.args[0], args[0], args[1], V_DOUBLE))
        loaded.align = 8
        return loaded

    return F64(array, index), generate


@intrinsic
def store_lanes(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store 16 lanes into a contiguous array of their type from an index on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _pointer_into(context, builder, signature.args[0], args[0], args[1], args[2].type)
        builder.store(args[2], pointer).align = value.lane.bitwidth // 8
        return context.get_dummy_value()

    return types.none(array, index, value), generate


@intrinsic
def widen(_typing: Any, value: Any) -> Any:
    """Return float32 lanes as float64."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.fpext(args[0], V_DOUBLE)

    return F64(value), generate


@intrinsic
def spread(_typing: Any, value: Any) -> Any:
    """Return a vector that holds one number, float32 or float64, in each lane."""
    kind = F32 if value == types.float32 else F64
    vector = V_FLOAT if value == types.float32 else V_DOUBLE

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(I32, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(V_I32, [0] * LANES))

    return kind(value), generate


@intrinsic
def keep(_typing: Any, value: Any, count: Any) -> Any:
    """Return a vector with its first `count` lanes, and 0 in the others."""
    zeros = ir.Constant(V_FLOAT if value.lane == types.float32 else V_DOUBLE, [0.0] * LANES)

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.select(_mask(builder, args[1]), args[0], zeros)

    return value(value, count), generate


@intrinsic
def first(_typing: Any, value: Any) -> Any:
    """Return lane 0."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.extract_element(args[0], ir.Constant(I32, 0))

    return value.lane(value), generate


@intrinsic
def total(_typing: Any, value: Any) -> Any:
    """Return the sum of the lanes, by halves: lane i and lane i + 8, then i + 4, i + 2, i + 1."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        rest, lanes = args[0], LANES
        while lanes > 1:
            lanes //= 2
            low, high = (
                builder.shuffle_vector(
                    rest,
                    ir.Constant(rest.type, ir.Undefined),
                    ir.Constant(ir.VectorType(I32, lanes), list(range(start, start + lanes))),
                )
                for start in (0, lanes)
            )
            rest = builder.fadd(low, high)
        return builder.extract_element(rest, ir.Constant(I32, 0))

    return value.lane(value), generate


def _lanewise(operation: str, meaning: str) -> Any:
    def typer(_typing: Any, left: Any, right: Any) -> Any:
        def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            return getattr(builder, operation)(*args)

        return left(left, right), generate

    typer.__doc__ = meaning
    return intrinsic(typer)


add = _lanewise("fadd", "Return the lanes' sums.")
sub = _lanewise("fsub", "Return the lanes' differences.")
mul = _lanewise("fmul", "Return the lanes' products.")


@intrinsic
def take_ticket(_typing: Any, counter: Any) -> Any:
    """Return the number in element 0 of an int64 array and add 1 to it, as one step for all threads."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


def _prefetch(write: int, meaning: str) -> Any:
    def typer(_typing: Any, tag: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            byte = ir.IntType(8).as_pointer()
            shape = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
            function = _declared(builder, "llvm.prefetch.p0i8", shape)
            pointer = builder.bitcast(_pointer(builder, tag, args[1], args[2]), byte)
            builder.call(function, [pointer, *(ir.Constant(I32, value) for value in (write, 3, 1))])
            return context.get_dummy_value()

        return types.none(tag, address, index), generate

    typer.__doc__ = meaning
    return intrinsic(typer)


expect_load = _prefetch(0, "Begin to bring an element into the caches; harmless at any address.")
expect_store = _prefetch(1, "Begin to bring an element into the caches, to be written; harmless at any address.")


@intrinsic
def fence(_typing: Any) -> Any:
    """Make all that this thread has stored, past the caches too, visible to others before what follows."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, _args: Any) -> ir.Value:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


def _pointer(builder: ir.IRBuilder, tag: Any, address: ir.Value, index: ir.Value) -> ir.Value:
    element = STORED[tag][0]
    base = builder.inttoptr(address, element.as_pointer())
    return builder.bitcast(builder.gep(base, [index]), ir.VectorType(element, LANES).as_pointer())


def _pointer_into(context: Any, builder: ir.IRBuilder, kind: Any, array: Any, index: Any, vector: ir.Type) -> Any:
    base = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())


def _mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    undefined = ir.Constant(V_I32, ir.Undefined)
    narrow = builder.insert_element(undefined, builder.trunc(count, I32), ir.Constant(I32, 0))
    counts = builder.shuffle_vector(narrow, undefined, ir.Constant(V_I32, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(V_I32, list(range(LANES))), counts)


def _declared(builder: ir.IRBuilder, name: str, kind: ir.FunctionType) -> ir.Function:
    known = builder.module.globals.get(name)
    return ir.Function(builder.module, kind, name) if known is None else known
