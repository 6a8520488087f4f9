import json

import pytest

from llava_train.serving.protocol import RefusedError, Sent, parse

ASK = {"role": "user", "content": "Who?"}


def body(messages: object = (ASK,), **fields: object) -> bytes:
    return json.dumps({"messages": messages, **fields}).encode()


def test_what_a_request_asks() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}, picture], "name": "me"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    asked = parse(body(messages, max_tokens=9, max_completion_tokens=7, stop="#", seed=-1, top_p=0.5, n=1), 0.25)
    assert [turn.role for turn in asked.turns] == ["system", "user", "assistant", "user"]
    places = [f"messages[1].content[{number}]" for number in (0, 2)]
    assert asked.turns[1].parts == (Sent("data:x", places[0]), "What?", Sent("data:x", places[1]))
    assert [each.place for each in asked.images] == places
    assert (asked.limit, asked.stream, asked.include_usage, asked.model) == (7, False, False, None)
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stops) == (0.25, 0.5, -1, ("#",))
    assert sampling.logprobs is None
    assert parse(body(logprobs=True), 0).sampling.logprobs == 0
    assert parse(body(stream=True, stream_options={"include_usage": True}, temperature=2), 0).include_usage


def test_what_asks_for_nothing_is_taken_and_the_unknown_is_ignored() -> None:
    neutral = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
    }
    neutral |= {"logit_bias": None, "top_k": -1, "user": "me", "store": False, "never_heard_of": {"a": 1}}
    assert parse(body(**neutral), 0) == parse(body(), 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_k": 5}, "top_k"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role"),
        ({"messages": [ASK, ASK]}, "messages[1].role"),
        ({"messages": [ASK, {"role": "system", "content": "x"}]}, "messages[1].role"),
        ({"messages": [ASK, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": "data:x"}]}, ASK]},
            "messages[0].content[0]",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RefusedError) as refused:
        parse(body(**fields), 0)
    error = refused.value.body()["error"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(param)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"\xff\xfe{", b"[" * 100_000, b'"' + b"9" * 10_000 + b'"'])
def test_a_body_that_is_no_object_is_refused(broken: bytes) -> None:
    with pytest.raises(RefusedError, match="the body"):
        parse(broken, 0)
