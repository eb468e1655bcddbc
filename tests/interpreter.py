"""Triton's interpreter, which runs kernels on the CPU, made to round and multiply bfloat16 as GPUs do.

As it comes (3.6 to 3.9) it truncates float32 to bfloat16, converts other types to bfloat16's bit pattern as if it were
an integer, and multiplies matrices of bit patterns. A condition on scalars becomes an int32 when it meets a tensor, and
what they make together is no mask. And 3.6 rounds a fused multiply-add twice, and counts loops by arrays of one
element, which NumPy 2.4 no longer takes for integers.
"""

from __future__ import annotations

import numpy as np


def repair() -> None:
    """Replace the interpreter's conversions, products and loop counters; harmless where kernels are compiled."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def values(handle):
        """The numbers that a handle stands for, bfloat16 as float32."""
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def cast(self, source, dtype):
        dtype, data = dtype.scalar, values(source)
        if dtype == tl.bfloat16:
            wide = np.ascontiguousarray(data.astype(np.float32))
            bits = wide.view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
            return handle_of(np.where(np.isnan(wide), 0x7FC0, nearest).astype(np.uint16), dtype)
        return handle_of(data.astype(interpreter._get_np_dtype(dtype)), dtype)

    fp_to_fp, dot = builder.create_fp_to_fp, builder.create_dot

    def create_fp_to_fp(self, source, dtype, rounding_mode):
        if tl.bfloat16 in (source.dtype.scalar, dtype.scalar):
            return cast(self, source, dtype)
        return fp_to_fp(self, source, dtype, rounding_mode)

    def create_dot(self, a, b, d, *options):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *options)

    builder.cast_impl = cast
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    splat = builder.create_splat

    def create_splat(self, shape, value):
        made = splat(self, shape, value)
        return handle_of(made.data.astype(bool), tl.int1) if value.data.dtype == bool else made

    builder.create_splat = create_splat

    def create_fma(self, x, y, z):
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return handle_of(wide.astype(z.data.dtype), z.dtype.scalar)

    if not hasattr(interpreter._interpreter, "fma_fp32"):  # later versions have one that rounds once
        builder.create_fma = create_fma
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
