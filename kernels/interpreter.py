"""Makes Triton's interpreter, which runs kernels on CPU for tests, compute what a GPU would.

As it comes (3.6), it adds and multiplies the raw bits of bfloat16, fails on numpy 2.4, and leaves a float argument a
Python float, on which `.to` fails. Here bfloat16 is widened to float32 for each operation and rounded to nearest even
after it; products of matrices are exact and summed in float32, as tensor cores do up to the order of the sum.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

ELEMENTWISE = ("binary_op", "unary_op", "create_fma", "create_idiv", "create_rsqrt", "create_clampf", "create_erf")
CONVERSIONS = (
    "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc",
)  # fmt: skip


@functools.cache
def install() -> None:
    """Change the interpreter of this process, once."""
    for name in ELEMENTWISE:
        setattr(InterpreterBuilder, name, _widened(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    for name in CONVERSIONS:
        setattr(InterpreterBuilder, name, lambda self, source, target, *_: self.cast_impl(source, target))
    for operation in (ReduceOps, ScanOps):
        operation.apply_impl = _reduced(operation.apply_impl)
    interpreter._patch_lang_tensor = _indexed(interpreter._patch_lang_tensor)
    interpreter._implicit_cvt = _wrapped(interpreter._implicit_cvt)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _wide(handle: object) -> object:
    return TensorHandle(_to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _widened(operation):
    @functools.wraps(operation)
    def widened(self, *args):
        if not any(_is_bfloat16(one) for one in args):
            return operation(self, *args)
        found = operation(self, *map(_wide, args))
        return found if found.data.dtype == np.bool_ else TensorHandle(_to_bfloat16(found.data), tl.bfloat16)

    return widened


def _dot(operation):
    @functools.wraps(operation)
    def dot(self, a, b, accumulator, *rest):
        if a.data.dtype != np.float16 and not _is_bfloat16(a):
            return operation(self, a, b, accumulator, *rest)
        product = np.matmul(*(_wide(one).data.astype(np.float32) for one in (a, b)))
        if _is_bfloat16(accumulator):
            return TensorHandle(_to_bfloat16(product + _wide(accumulator).data), tl.bfloat16)
        return TensorHandle(product.astype(accumulator.data.dtype) + accumulator.data, accumulator.dtype.scalar)

    return dot


def _cast(operation):
    @functools.wraps(operation)
    def cast(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return operation(self, source, target)
        if after == tl.bfloat16:
            return TensorHandle(_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        wide = _wide(source)
        return wide if after == tl.float32 else operation(self, wide, target)

    return cast


def _reduced(operation):
    @functools.wraps(operation)
    def reduced(self, inputs):
        narrow = [one.dtype == tl.bfloat16 for one in inputs]
        if not any(narrow):
            return operation(self, inputs)
        found = operation(self, tuple(_retyped(one, tl.float32) if is_narrow else one
                                      for one, is_narrow in zip(inputs, narrow, strict=True)))  # fmt: skip
        several = found if isinstance(found, list | tuple) else [found]
        # An index beside a maximum is no float32, and stays as it is.
        several = [_retyped(one, tl.bfloat16) if one.dtype == tl.float32 else one for one in several]
        return several if isinstance(found, list | tuple) else several[0]

    return reduced


def _retyped(tensor, dtype):
    """A tensor of bfloat16 as one of float32, or the other way round."""
    data = _to_float32(tensor.handle.data) if dtype == tl.float32 else _to_bfloat16(tensor.handle.data)
    return tl.core.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)) if data.shape else dtype)


def _indexed(patch):
    """numpy 2.4 makes no int of an array with one item."""

    @functools.wraps(patch)
    def patched(tensor, scope=None):
        found = patch(tensor, scope) if scope is not None else patch(tensor)
        put = scope.set_attr if scope is not None else setattr
        put(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))
        return found

    return patched


def _wrapped(convert):
    @functools.wraps(convert)
    def converted(argument):
        if type(argument) is float:
            return tl.core.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    return converted
