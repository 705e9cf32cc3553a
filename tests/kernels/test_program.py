"""One kernel with everything fixed: what it refuses to compile and what it refuses to touch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from baton_kernels.capabilities import named
from baton_kernels.rt.language import INTERPRETED, jit, tl
from baton_kernels.rt.program import CompileFailed, InputError, Program, pointer

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
CONFIG = {"num_warps": 4, "num_stages": 1}


@jit
def _sums(X, OUT, n, BLOCK: tl.constexpr, BROKEN: tl.constexpr):
    tl.static_assert(not BROKEN, "made to fail")
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0)
    tl.store(OUT, tl.sum(x, 0))


def program(device="sm_90", *, out=pointer(torch.float32), broken=False, variant="", **found):
    return Program(
        _sums,
        types={"X": pointer(torch.float32), "OUT": out, "n": "i32"},
        constants={"BLOCK": 1024, "BROKEN": broken},
        config=CONFIG,
        capabilities=replace(named(device), **found),
        variant=variant,
    )


def on_device(*size, dtype=torch.float32):
    """Stands for a tensor in device memory: there is an address and no data."""
    return torch.empty(*size, dtype=dtype, device="meta")


def test_it_compiles_for_a_device_that_is_not_here_and_holds_what_it_compiled():
    one = program("gfx950")
    assert "v_add_f32" in one.compile().asm["amdgcn"]
    assert one.compile() is one.compile()


def test_programs_that_share_a_kernel_have_names_of_their_own():
    assert program().name == "_sums"
    assert program(variant="decode").name == "_sums:decode"
    assert program(variant="decode").kernel_name == "_sums"


def test_what_the_compiler_refuses_is_said_in_one_line_with_kernel_and_device(capfd):
    with pytest.raises(CompileFailed, match=r"^_sums for sm_90: .*made to fail") as failure:
        program(broken=True).compile()
    assert "\n" not in str(failure.value)
    assert capfd.readouterr().out == ""


def test_of_a_long_message_the_place_and_the_end_are_kept(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("at 3:4:\n" + "source\n" * 100 + "type mismatch")

    monkeypatch.setattr(triton, "compile", fail)
    with pytest.raises(CompileFailed, match=r"^_sums for sm_90: at 3:4: source .* … .* type mismatch$") as failure:
        program().compile()
    assert len(str(failure.value)) < 300


def test_more_shared_memory_than_the_device_has_is_refused():
    with pytest.raises(CompileFailed, match=r"_sums for sm_90: needs \d+ bytes of shared memory, the device has 8"):
        program(shared_bytes=8).compile()


def test_more_tensor_memory_than_the_device_has_is_refused(monkeypatch):
    compiled = SimpleNamespace(metadata=SimpleNamespace(shared=0, tmem_size=1024))
    monkeypatch.setattr(triton, "compile", lambda *_, **__: compiled)
    with pytest.raises(CompileFailed, match="needs 1024 columns of tensor memory, the device has 512"):
        program("sm_100").compile()


def test_parameters_in_another_order_than_the_kernels_are_a_mistake_of_ours():
    wrong = Program(
        _sums,
        types={"OUT": pointer(torch.float32), "X": pointer(torch.float32), "n": "i32"},
        constants={"BLOCK": 1024, "BROKEN": False},
        config=CONFIG,
        capabilities=named("sm_90"),
    )
    with pytest.raises(AssertionError, match="_sums takes"):
        wrong.compile()


@pytest.mark.parametrize(
    ("x", "out", "why"),
    [
        (on_device(8, dtype=torch.float16), on_device(1), "_sums: X is torch.float16, compiled for torch.float32"),
        (on_device(8), on_device(1, dtype=torch.int32), "_sums: OUT is torch.int32, compiled for torch.float32"),
        (on_device(9)[1:], on_device(1), "_sums: X does not start at a multiple of 16 bytes"),
        (torch.zeros(8), on_device(1), "_sums: X is in host memory; kernels read device memory"),
    ],
)
def test_a_tensor_that_is_not_what_was_agreed_is_never_touched(x, out, why):
    with pytest.raises(InputError, match=why):
        program()((0, 1, 1), x, out, 8)


def test_where_no_alignment_was_promised_none_is_asked_for():
    program(out=pointer(torch.float32) + "~")((0, 1, 1), on_device(8), on_device(2)[1:], 8)


def test_the_promise_of_alignment_reaches_the_compiler_only_where_it_was_given():
    promise = "%OUT: !tt.ptr<f32> {tt.divisibility = 16"
    assert promise in program().compile().asm["ttir"]
    assert promise not in program(out=pointer(torch.float32) + "~").compile().asm["ttir"]


def test_an_empty_grid_launches_and_compiles_nothing():
    program(broken=True)((4, 0, 1), on_device(8), on_device(1), 8)


def test_a_call_takes_all_arguments():
    with pytest.raises(ValueError, match="zip"):
        program()((1, 1, 1), on_device(8), on_device(1))
