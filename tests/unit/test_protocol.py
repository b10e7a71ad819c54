"""Messages: each one survives the wire, and nothing else than messages is read."""

from __future__ import annotations

import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_vllm_ext import protocol
from areal_vllm_ext.control.directory import Directory
from areal_vllm_ext.protocol import Error, Hello, Message, Welcome
from examples import examples

if typing.TYPE_CHECKING:
    from raw_client import RawClient

    from harness.simulated_engine import Deployment

MESSAGES = sorted(Message.__subclasses__(), key=lambda message: message.__name__)
DECODERS = {
    "engine": protocol.engine_decoder,
    "directory": protocol.directory_decoder,
    "worker": protocol.worker_decoder,
    "answer": protocol.answer_decoder,
}
TEXT = st.text(alphabet="aé漢\0", max_size=8)  # a small alphabet: the whole of Unicode takes hypothesis seconds to load
INTEGER = st.integers(-(2**63), 2**64 - 1)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is typing.Annotated:
        low, high = arguments[1].ge, arguments[1].le
        if arguments[0] is int:
            return st.integers(low, high)
        return values(arguments[0]).filter(lambda v: (low is None or v >= low) and (high is None or v <= high))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=2).map(tuple)
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.fixed_dictionaries({f.name: values(f.type) for f in msgspec.structs.fields(kind)}).map(
            lambda given, made=kind: made(**given)
        )
    simple = {
        str: TEXT,
        bytes: st.binary(max_size=8),
        int: INTEGER,
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
    }
    return simple[kind]


def example(kind: type[Any]) -> Any:
    """One plain message, or part of one, of this type."""

    def plain(kind: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Literal:
            return arguments[0]
        if origin in (typing.Union, types.UnionType, typing.Annotated):
            return plain(arguments[0])
        if origin is tuple:
            return tuple(plain(argument) for argument in arguments if argument is not Ellipsis)
        if origin is dict:
            return {plain(arguments[0]): plain(arguments[1])}
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return kind(**{f.name: plain(f.type) for f in msgspec.structs.fields(kind)})
        return {str: "text", bytes: b"raw", int: 1, bool: True, float: 1.5}[kind]

    return plain(kind)


def decoders_of(message: Message) -> dict[str, msgspec.msgpack.Decoder[Any]]:
    """The decoders that read this message."""
    encoded, readers = protocol.encoder.encode(message), {}
    for name, decoder in DECODERS.items():
        try:
            decoder.decode(encoded)
        except msgspec.ValidationError:
            continue
        readers[name] = decoder
    return readers


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@examples(20)
@given(data=st.data())
def test_every_message_comes_out_of_the_wire_as_it_went_in(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    readers = decoders_of(message)
    assert readers, f"nobody reads {kind.__name__}"
    for decoder in readers.values():
        assert decoder.decode(protocol.encoder.encode(message)) == message


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_an_unknown_field_is_refused(kind: type[Message]) -> None:
    message = example(kind)
    fields = msgspec.to_builtins(message, builtin_types=(bytes,)) | {"surplus": 1}
    for decoder in decoders_of(message).values():
        with pytest.raises(msgspec.ValidationError, match="surplus"):
            decoder.decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("part", [protocol.EngineInfo, protocol.WorkerInfo, *typing.get_args(protocol.Transfer)])
def test_an_unknown_field_inside_a_message_is_refused(part: type[msgspec.Struct]) -> None:
    fields = msgspec.to_builtins(example(part), builtin_types=(bytes,)) | {"surplus": 1}
    with pytest.raises(msgspec.ValidationError, match="surplus"):
        msgspec.msgpack.Decoder(part).decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_an_unknown_tag_is_refused(kind: type[Message]) -> None:
    message = example(kind)
    fields = msgspec.to_builtins(message) | {"type": "Reboot"}
    for decoder in decoders_of(message).values():
        with pytest.raises(msgspec.ValidationError, match="Reboot"):
            decoder.decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field.name) for kind in MESSAGES for field in msgspec.structs.fields(kind)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_field_of_the_wrong_type_is_refused(kind: type[Message], field: str) -> None:
    message = example(kind)
    wrong = msgspec.to_builtins(message) | {field: [[]]}
    for decoder in decoders_of(message).values():
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode(wrong))


def test_engines_do_not_read_answers_and_clients_do_not_read_requests() -> None:
    requests = [kind for kind in MESSAGES if "engine" in decoders_of(example(kind))]
    answers = [kind for kind in MESSAGES if "answer" in decoders_of(example(kind))]
    assert set(requests).isdisjoint(answers)


@pytest.mark.parametrize("number", [0, protocol.PROTOCOL_VERSION + 1, 99])
def test_another_protocol_number_is_answered_with_both_numbers(number: int) -> None:
    answer = Directory().handle(Hello(protocol=number), now=0.0)
    assert isinstance(answer, Error)
    assert answer.kind == "protocol"
    assert f"protocol {number}," in answer.message
    assert f"this side {protocol.PROTOCOL_VERSION} " in answer.message
    assert "install the same areal-vllm-ext" in answer.message


def test_an_endpoint_refuses_another_protocol_and_welcomes_its_own(
    deployment: Deployment, raw: typing.Callable[..., RawClient]
) -> None:
    client = raw(deployment.engines[0].endpoint.address)
    refusal = client.ask(Hello(protocol=99))
    assert isinstance(refusal, Error)
    assert refusal.kind == "protocol"
    assert "protocol 99," in refusal.message
    welcome = client.ask(Hello())
    assert isinstance(welcome, Welcome)
    assert welcome.engine is not None
    assert welcome.engine.dp_rank == 0
