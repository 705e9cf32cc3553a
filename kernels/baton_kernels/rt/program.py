"""One Triton kernel with everything fixed but its run-time arguments: compiled once, then launched without the JIT.

Convention of our kernels: run-time parameters first, all `constexpr` after them. Integers are never specialised on
their value and pointers are promised to be 16-byte aligned, so one compiled kernel fits all calls; a launch checks
dtype, device and alignment of each tensor, because a held kernel would not notice. A type is Triton's own
("*bf16", "i32", "fp32", "tensordesc<...>"); a trailing "~" takes the promise of alignment back.
Under the interpreter nothing is compiled and the kernel runs on CPU tensors.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.rt.language import INTERPRETED

Config = Mapping[str, int]
"""Tile sizes of one kernel, and Triton's num_warps and num_stages."""

OPTIONS = ("num_warps", "num_stages")
ALIGNMENT_BYTES = 16
SAID = 240  # characters of a compiler's message that are passed on
TENSOR_MEMORY_COLUMNS = 512  # of one Blackwell multiprocessor
TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


class CompileFailed(Exception):
    """The installed Triton cannot compile a kernel for this device; one line says what it said."""


class InputError(ValueError):
    """A tensor that a kernel must not touch: dtype, shape, strides, alignment or device are not what was agreed."""


def pointer(dtype: torch.dtype) -> str:
    """Type of a pointer argument to elements of `dtype`."""
    return f"*{TYPE_NAMES[dtype]}"


class Program:
    """A kernel for one device, dtype and shape class."""

    def __init__(
        self,
        kernel: Any,
        *,
        types: Mapping[str, str],
        constants: Mapping[str, object],
        config: Config,
        capabilities: Capabilities,
        variant: str = "",
    ) -> None:
        """`types`: the run-time parameters in order; `constants`: the rest in order, tile sizes too. `variant` tells
        programs of one operation apart that share a kernel: "decode", "extend"."""
        self.kernel_name: str = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__
        self.name = f"{self.kernel_name}:{variant}" if variant else self.kernel_name
        self.capabilities = capabilities
        self.options = {name: config[name] for name in OPTIONS if name in config}
        self._kernel = kernel
        self._types = dict(types)
        self._constants = dict(constants)
        self._compiled: Any = None
        self._expected = [
            (name, _DTYPES.get(text.strip("*~")) if text.startswith("*") else None, not text.endswith("~"))
            for name, text in types.items()
        ]
        self._tail = tuple(constants.values())

    def compile(self) -> Any:
        """Compile for the device's target, which need not be here. Returns Triton's CompiledKernel.

        CompileFailed when Triton refuses, or when the kernel needs more memory inside a unit than the device has.
        """
        if self._compiled is not None or INTERPRETED:
            return self._compiled
        from triton import compile as compile_kernel  # noqa: PLC0415 - absent where there is no Triton
        from triton.compiler import ASTSource  # noqa: PLC0415

        names = (*self._types, *self._constants)
        assert names == tuple(self._kernel.arg_names), f"{self.name} takes {self._kernel.arg_names}, not {names}"
        types = {name: text.rstrip("~") for name, text in self._types.items()}
        aligned = {
            (index,): [["tt.divisibility", ALIGNMENT_BYTES]]
            for index, text in enumerate(self._types.values())
            if text.startswith("*") and not text.endswith("~")
        }
        said = io.StringIO()  # a failing assembler prints the whole program
        try:
            source = ASTSource(
                self._kernel,
                signature=types | dict.fromkeys(self._constants, "constexpr"),
                constexprs={(names.index(name),): value for name, value in self._constants.items()},
                attrs=aligned,
            )
            with contextlib.redirect_stdout(said):
                compiled = compile_kernel(source, target=self.capabilities.target, options=self.options)
        except Exception as error:  # Triton raises whatever its passes raise
            why = " ".join(str(error).split()) or type(error).__name__
            if len(why) > SAID:  # where it is comes first, then much source text, what is wrong last
                why = f"{why[: SAID // 4]} … {why[-SAID * 3 // 4 :]}"
            raise CompileFailed(f"{self.name} for {self.capabilities.name}: {why}") from error
        if compiled.metadata.shared > self.capabilities.shared_bytes:
            raise CompileFailed(
                f"{self.name} for {self.capabilities.name}: needs {compiled.metadata.shared} bytes of shared memory, "
                f"the device has {self.capabilities.shared_bytes}"
            )
        columns = getattr(compiled.metadata, "tmem_size", None) or 0  # NVIDIA's back end alone has it
        if columns > TENSOR_MEMORY_COLUMNS:
            raise CompileFailed(
                f"{self.name} for {self.capabilities.name}: needs {columns} columns of tensor memory, "
                f"the device has {TENSOR_MEMORY_COLUMNS}"
            )
        self._compiled = compiled
        return compiled

    def load(self) -> None:
        """Compile, and put the code on the device, which must be here and current: what a launch could still refuse
        (registers, shared memory of this very card) is CompileFailed now and not in the middle of serving."""
        compiled = self.compile()
        if compiled is None:
            return
        try:
            compiled.run  # noqa: B018 - Triton loads the code when it makes the launcher
        except Exception as error:  # OutOfResources, or whatever the driver says
            why = " ".join(str(error).split())[:SAID] or type(error).__name__
            raise CompileFailed(f"{self.name} does not load on {self.capabilities.name}: {why}") from error

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream; returns at once. `arguments` in the order of `types`. InputError."""
        for argument, (name, dtype, aligned) in zip(arguments, self._expected, strict=True):
            if isinstance(argument, Tensor):
                self._check(argument, name, dtype, aligned)
        if 0 in grid:
            return
        if INTERPRETED:
            self._kernel[grid](*arguments, **self._constants)
            return
        if self._compiled is None:
            self.compile()
        self._compiled[grid](*arguments, *self._tail)

    def _check(self, tensor: Tensor, name: str, dtype: torch.dtype | None, aligned: bool) -> None:
        if tensor.dtype is not dtype:
            raise InputError(f"{self.name}: {name} is {tensor.dtype}, compiled for {dtype}")
        if aligned and tensor.data_ptr() % ALIGNMENT_BYTES:
            raise InputError(f"{self.name}: {name} does not start at a multiple of {ALIGNMENT_BYTES} bytes")
        if not INTERPRETED and tensor.device.type == "cpu":
            raise InputError(f"{self.name}: {name} is in host memory; kernels read device memory")
