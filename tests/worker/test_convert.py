"""Protobuf and engine records say the same, and a bad field is refused by its name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_common.errors import BatonError, ErrorKind, Incompatible, InvalidRequest
from baton_common.hashing import token_bytes
from baton_common.ids import PageHash, RequestId
from baton_engine.request import FinishReason, Keep, Mode, SamplingParams
from baton_engine.role import TokenLogprobs, TokenOut
from baton_proto import common_pb2, worker_pb2
from baton_proto.compat import CONVERTED, pairing_key
from baton_worker import convert

VOCAB = 100
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def submit(**fields: object) -> worker_pb2.Submit:
    message = worker_pb2.Submit(
        handle=1,
        request_id="r",
        mode=worker_pb2.SUBMIT_MODE_LOCAL,
        tokens=token_bytes([1, 2, 3]),
        prompt_tokens=3,
        sampling=worker_pb2.Sampling(temperature=1, top_p=1, repetition_penalty=1, max_tokens=4),
        deadline_ms=1500,
    )
    sampling = fields.pop("sampling", {})
    for name, value in fields.items():
        setattr(message, name, value)
    message.sampling.MergeFrom(worker_pb2.Sampling(**sampling))
    return message


def request_of(message: worker_pb2.Submit):
    return convert.request_from(message, request_id=RequestId("r/1.1"), now_s=10.0)


def test_a_submit_becomes_a_request_with_its_deadline_on_our_clock() -> None:
    request = request_of(submit(priority=3, cache_salt="tenant"))
    assert (request.mode, request.tokens, request.prompt_tokens) == (Mode.LOCAL, [1, 2, 3], 3)
    assert (request.arrival_s, request.deadline_s) == (10.0, 11.5)
    assert (request.priority, request.cache_salt, request.request_id) == (3, "tenant", "r/1.1")


def test_a_moved_request_keeps_its_outputs() -> None:
    request = request_of(submit(tokens=token_bytes([1, 2, 3, 4, 5]), prompt_tokens=3))
    assert request.output_tokens == 2


def test_what_is_kept_is_kept_for_a_tenant() -> None:
    message = submit()
    assert request_of(message).keep is None
    message.keep.CopyFrom(worker_pb2.KvKeep(session="chat", ttl_ms=1500, tenant="t"))
    assert request_of(message).keep == Keep(session="chat", ttl_s=1.5, tenant="t")


def test_a_session_without_a_name_is_refused() -> None:
    message = submit()
    message.keep.ttl_ms = 1
    with pytest.raises(InvalidRequest) as refusal:
        request_of(message)
    assert refusal.value.param == "keep"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": 0}, "mode"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"tokens": b""}, "prompt"),
        ({"tokens": b"\x01\x00\x00"}, "prompt"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        request_of(submit(**fields))
    assert refusal.value.param == param
    assert "\n" not in str(refusal.value)


@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 100, width=32),
        top_k=st.integers(0, VOCAB),
        top_p=st.floats(0.125, 1, width=32),
        min_p=st.floats(0, 1, width=32),
        repetition_penalty=st.floats(0.125, 100, width=32),
        presence_penalty=st.floats(-2, 2, width=32),
        frequency_penalty=st.floats(-2, 2, width=32),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32)),
        seed=st.integers(0, 2**64 - 1),
        max_tokens=st.integers(10, 1000),
        min_tokens=st.integers(0, 10),
        stop_token_ids=st.frozensets(st.integers(0, VOCAB - 1)),
        ignore_eos=st.booleans(),
        logprobs=st.booleans(),
        top_logprobs=st.integers(0, 20),
    )
)
def test_sampling_survives_the_wire(sampling: SamplingParams) -> None:
    wire = worker_pb2.Sampling.FromString(convert.sampling_message(sampling).SerializeToString())
    assert convert.sampling_from(wire) == sampling


ids = st.integers(0, 2**31 - 1)
token_outs = st.builds(
    TokenOut,
    request_id=st.just(RequestId("")),
    position=ids,
    token_id=ids,
    finish=st.none() | st.sampled_from(FinishReason),
    logprobs=st.none()
    | st.builds(TokenLogprobs, logprob=floats, top=st.lists(st.tuples(ids, floats), max_size=3).map(tuple)),
    cached_tokens=st.none() | ids,
)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), token_outs), max_size=6))
def test_the_tokens_of_a_step_survive_the_wire_in_columns(entries: list[tuple[int, TokenOut]]) -> None:
    message = convert.tokens_message(7, entries)
    wire = worker_pb2.WorkerMessage.FromString(message.SerializeToString()).tokens
    assert wire.step == 7
    assert convert.tokens_from(wire) == entries


def test_a_stop_names_the_token_that_stopped() -> None:
    token = TokenOut(request_id=RequestId("r"), position=3, token_id=42, finish=FinishReason.STOP)
    assert convert.tokens_message(1, [(5, token)]).tokens.finishes[0].stop_token_id == 42


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_error_kind_survives_the_wire(kind: ErrorKind) -> None:
    error = BatonError("what to do", kind=kind, param="field", retry_after_ms=250)
    back = convert.error_from(convert.error_message(error))
    assert (back.kind, back.message, back.param, back.retry_after_ms) == (kind, "what to do", "field", 250)


def test_kv_changes_come_in_pieces_and_only_the_first_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "HASHES_PER_MESSAGE", 2)
    hashes = [PageHash(bytes([index]) * 16) for index in range(5)]
    pieces = convert.kv_changes(hashes, [], snapshot=True)
    assert [piece.snapshot for piece in pieces] == [True, False, False]
    assert b"".join(piece.stored for piece in pieces) == b"".join(hashes)
    assert len(convert.kv_changes([], [], snapshot=True)) == 1
    assert convert.kv_changes([], []) == []


COMPAT = common_pb2.Compat(
    protocol_version=1, model_digest="d", compute_dtype="float32", kv_dtype="float32", page_tokens=64, layers=2,
    kv_heads=2, head_dim=16, layout="page_layer_kv_head_token_dim", rope="r", tp_size=1,
)  # fmt: skip


FIELDS = [field.name for field in common_pb2.Compat.DESCRIPTOR.fields]


def differing(field: str) -> common_pb2.Compat:
    other = common_pb2.Compat()
    other.CopyFrom(COMPAT)
    value = getattr(COMPAT, field)
    setattr(other, field, f"{value}x" if isinstance(value, str) else value + 1)
    return other


@pytest.mark.parametrize("field", sorted(CONVERTED))
def test_what_the_transfer_converts_may_differ(field: str) -> None:
    convert.check_compat(COMPAT, differing(field))
    assert pairing_key(COMPAT) == pairing_key(differing(field)), "the router pairs them too"


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in CONVERTED])
def test_any_other_differing_field_is_named_with_both_values(field: str) -> None:
    other = differing(field)
    assert pairing_key(COMPAT) != pairing_key(other)
    with pytest.raises(Incompatible) as refusal:
        convert.check_compat(COMPAT, other)
    assert refusal.value.field == field
    assert refusal.value.param == field
    assert refusal.value.theirs in str(refusal.value)


def test_equal_compat_is_no_refusal() -> None:
    convert.check_compat(COMPAT, common_pb2.Compat.FromString(COMPAT.SerializeToString()))
