"""The kernels of one device: the first that compiles is bound; what does not is a warning and a count, not a crash."""

import logging
import threading
from dataclasses import replace

import pytest
import torch
from support.kernel_family import Fake, Size, family, implementation

from baton_kernels.capabilities import CPU, named
from baton_kernels.library import Library
from baton_kernels.oracle import Unsupported
from baton_kernels.rt.language import INTERPRETED, jit, tl
from baton_kernels.rt.program import CompileFailed, Program, pointer

HOPPER = named("sm_90")


def refuse():
    raise CompileFailed("kernel for sm_90: made to fail")


@jit
def _broken(OUT, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "made to fail")
    tl.store(OUT, 1.0)


def broken_kernel(capabilities=HOPPER):
    return Program(
        _broken,
        types={"OUT": pointer(torch.float32)},
        constants={"BLOCK": 1},
        config={},
        capabilities=capabilities,
    )


def test_all_programs_of_an_operation_are_compiled_when_it_is_bound_and_only_then():
    programs = Fake(), Fake()
    library, one = Library(HOPPER), family(implementation("triton", *programs))
    bound = library.bind(one, Size())
    assert library.bind(one, Size()) is bound
    assert [program.compiled for program in programs] == [1, 1]
    assert library.bind(one, Size("large")) is not bound
    assert [(choice.label, choice.implementation) for choice in library.choices] == [
        ("small", "triton"), ("large", "triton"),
    ]  # fmt: skip
    assert library.fallbacks == {("made_up", "triton"): 0}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_kernel_that_does_not_compile_costs_a_warning_a_count_and_the_next_candidate(caplog):
    good = Fake()
    library = Library(HOPPER)
    with caplog.at_level(logging.DEBUG, "baton.kernels"):
        bound = library.bind(
            family(implementation("gluon", Fake(), broken_kernel()), implementation("triton", good)), Size()
        )
    assert bound.name == "triton"
    assert good.compiled == 1
    assert library.fallbacks == {("made_up", "triton"): 1}
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.op == "made_up"
    assert "made to fail" in warning.why
    (choice,) = library.choices
    assert choice.reason.startswith("gluon: _broken for sm_90: ")


def test_the_torch_reference_on_a_gpu_is_a_warning_and_a_count_and_on_a_cpu_neither(caplog):
    for capabilities, slow in ((HOPPER, True), (CPU, False)):
        caplog.clear()
        library = Library(capabilities)
        with caplog.at_level(logging.WARNING, "baton.kernels"):
            assert library.bind(family(implementation("triton", why="no")), Size()).name == "torch"
        assert library.fallbacks == {("made_up", "torch"): int(slow)}
        assert len(caplog.records) == slow


def test_every_shape_class_that_falls_back_counts_once():
    library, one = Library(HOPPER), family(implementation("triton", Fake(refuse)))
    for label in ("small", "large", "small"):
        library.bind(one, Size(label))
    assert library.fallbacks == {("made_up", "torch"): 2}


def test_the_device_that_is_asked_for_more_shared_memory_than_it_has_falls_back_too():
    small = replace(HOPPER, shared_bytes=0)
    program = Fake(lambda: (_ for _ in ()).throw(CompileFailed("needs 16 bytes of shared memory")))
    library = Library(small)
    assert library.bind(family(implementation("triton", program)), Size()).name == "torch"


def test_when_nothing_compiles_each_ones_reason_is_said():
    library = Library(HOPPER, force={"made_up": "triton"})
    with pytest.raises(Unsupported, match=r"made_up small does not compile for sm_90: triton: .*made to fail"):
        library.bind(family(implementation("triton", Fake(refuse))), Size())
    assert library.choices == ()


def test_what_is_asked_for_by_name_runs_even_where_something_faster_could():
    library = Library(HOPPER, force={"made_up": "torch", "another": "triton"})
    fast = Fake()
    assert library.bind(family(implementation("triton", fast)), Size()).name == "torch"
    assert fast.compiled == 0


def test_threads_that_bind_the_same_share_one_operation_compiled_once():
    program, start = Fake(), threading.Barrier(8)
    library, one = Library(HOPPER), family(implementation("triton", program))
    bound = []

    def bind():
        start.wait(10)
        bound.append(library.bind(one, Size()))

    threads = [threading.Thread(target=bind) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(bound) == 8
    assert len(set(map(id, bound))) == 1
    assert program.compiled == 1
    assert len(library.choices) == 1


def test_who_asks_what_was_chosen_does_not_wait_for_a_compiler():
    compiling, go_on = threading.Event(), threading.Event()

    def slowly():
        compiling.set()
        assert go_on.wait(10)

    library = Library(HOPPER)
    thread = threading.Thread(target=library.bind, args=(family(implementation("triton", Fake(slowly))), Size()))
    thread.start()
    assert compiling.wait(10)
    assert library.choices == ()
    assert library.fallbacks == {}
    go_on.set()
    thread.join(10)
    assert len(library.choices) == 1
