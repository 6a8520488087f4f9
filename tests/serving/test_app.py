import base64
import functools
import http.server
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

import httpx
import openai
import pytest

from llava_train.chat.pictures import PictureLimits
from llava_train.serving.batching import Job
from llava_train.serving.decoding import Sampling
from llava_train.serving.prompting import Bounds, context_of
from tests.serving.conftest import WAIT_S, Served, data_url, expected, user

COMPLETIONS = "/v1/chat/completions"


@pytest.fixture
def served(ours, serving) -> Served:
    return serving(ours, bounds=Bounds(length=context_of(ours)))


def ask(served: Served, *messages: dict, **options: object):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return served.client().chat.completions.create(model="tiny", messages=list(messages), **options)


def post(served: Served, content: bytes, **headers: str):
    return httpx.post(
        served.url + COMPLETIONS,
        content=content,
        headers={"Content-Type": "application/json", **headers},
        timeout=WAIT_S,
        trust_env=False,
    )


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_the_answer_is_that_of_the_library(kind: str, parts: Path, serving, request) -> None:
    assembly, data = request.getfixturevalue(kind), parts / "data"
    served = serving(assembly)
    for names in (["1.png"], ["2.png", "1.png"], []):
        said = ask(served, user(*(data / name for name in names), "What colour is it?"), max_tokens=25)
        want = expected(assembly, data, names, "What colour is it?", 25)
        assert want and said.choices[0].message.content == want
        tokens, reason = said.usage.completion_tokens, said.choices[0].finish_reason
        assert (reason == "length") == (tokens == 25)
        assert said.usage.total_tokens == said.usage.prompt_tokens + tokens
        assert (said.model, said.object) == ("tiny", "chat.completion")


def test_pictures_stand_where_the_request_has_them(stock, parts: Path, serving) -> None:
    """In a template of the model's own, which keeps the order of the parts."""
    served, (one, two) = serving(stock), (parts / "data" / "1.png", parts / "data" / "2.png")
    orders = [(one, "Hm?", two), (two, "Hm?", one), (one, two, "Hm?")]
    said = [ask(served, user(*order)).choices[0].message.content for order in orders]
    assert len({*said}) == 3


def test_a_conversation_with_a_system_message(served: Served, ours) -> None:
    turns = [user("What is it?"), {"role": "assistant", "content": "A cat."}, user("Sure?")]
    said = [ask(served, *turns), ask(served, {"role": "system", "content": "Say no."}, *turns), ask(served, turns[0])]
    assert len({each.choices[0].message.content for each in said}) == 3
    assert len({each.usage.prompt_tokens for each in said}) == 3


def test_streaming_says_the_same(served: Served, parts: Path) -> None:
    question = user(parts / "data" / "1.png", "What colour is it?")
    whole = ask(served, question, max_tokens=25, logprobs=True, top_logprobs=2)
    options = {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
    chunks = list(ask(served, question, max_tokens=25, stream=True, **options))
    said = [chunk.choices[0] for chunk in chunks[:-1]]
    assert said[0].delta.role == "assistant"
    assert "".join(each.delta.content or "" for each in said) == whole.choices[0].message.content
    assert sum(bool(each.delta.content) for each in said) > 5  # not in one piece
    assert [each.finish_reason for each in said[-2:]] == [None, "length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    told = [entry for each in said if each.logprobs for entry in each.logprobs.content]
    assert told == whole.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in told] == [2] * 25
    assert all(entry.token == entry.top_logprobs[0].token for entry in told)  # greedy
    lines = post(served, json.dumps({"messages": [question], "max_tokens": 2, "stream": True}).encode()).text
    assert lines.startswith("data: {") and lines.endswith("\n\ndata: [DONE]\n\n")


def test_stop_strings_seeds_and_limits(served: Served, parts: Path) -> None:
    question = user(parts / "data" / "1.png", "What colour is it?")
    whole = ask(served, question, max_tokens=25).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    for stream in (False, True):
        said = ask(served, question, max_tokens=25, stop=[stop, "never said"], stream=stream)
        choices = [chunk.choices[0] for chunk in said] if stream else said.choices
        text = "".join((each.delta if stream else each.message).content or "" for each in choices)
        assert text == whole[: whole.index(stop)].strip()
        assert choices[-1].finish_reason == "stop"
    drawn = [ask(served, question, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(served, question, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_eight_at_once_say_what_they_say_alone(served: Served, parts: Path) -> None:
    asked = [
        ((user(parts / "data" / f"{number}.png", "What?"),), {"max_tokens": 5 + number, "seed": 1, "temperature": heat})
        for number, heat in enumerate([0, 0, 0.7, 0, 1, 0, 0, 0.5])
    ]
    alone = [ask(served, *messages, **options).choices[0].message.content for messages, options in asked]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, served, *messages, **options) for messages, options in asked]
        assert [future.result().choices[0].message.content for future in futures] == alone
    assert len({*alone}) == 8


def test_models_and_health(served: Served, ours) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    assert client.models.list().data[0].max_model_len == 256
    health = httpx.get(f"{served.url}/health", trust_env=False)
    assert (health.status_code, health.json()) == (200, {"status": "ok", "running": 0, "waiting": 0})
    for call in (
        lambda: client.models.retrieve("other"),
        lambda: client.chat.completions.create(model="other", messages=[user("Hi")]),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, only 'tiny'"):
            call()
    nowhere = httpx.get(f"{served.url}/v1/completions", trust_env=False)
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")


def test_keys(ours, serving) -> None:
    served = serving(ours, api_key="sesame")
    messages = [user("Hi")]
    said = served.client("sesame").chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert said.usage.completion_tokens == 2
    for key in ("sesam", "sesame2", "sésame"[:1]):
        with pytest.raises(openai.AuthenticationError) as refused:
            served.client(key).chat.completions.create(model="tiny", messages=messages)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            served.client(key).models.list()
    assert post(served, b"{}").status_code == 401
    assert post(served, b"{}", Authorization="Basic sesame").status_code == 401
    assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200


def test_pages_of_other_sites_are_kept_out(ours, serving) -> None:
    served = serving(ours, hosts=("localhost", "127.0.0.1", "::1"))
    body = json.dumps({"messages": [user("Hi")], "max_tokens": 1}).encode()
    assert post(served, body).status_code == 200
    assert post(served, body, Host="localhost:80").status_code == 200
    assert post(served, body, Host="[::1]:8000").status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000"):
        assert post(served, body, Host=host).status_code == 403
    assert post(served, body, **{"Content-Type": "text/plain"}).status_code == 415


def test_wrong_requests_are_told_what_is_wrong(served: Served, parts: Path, capsys) -> None:
    good = data_url(parts / "data" / "1.png")
    broken = "data:image/png;base64," + base64.b64encode(b"no picture at all").decode()
    wrong = [
        ([user("Hi"), user("Hi")], {}, "messages[1].role"),
        ([user("Hi")], {"n": 2}, "n"),
        ([user(good, broken, "What?")], {}, "messages[0].content[1]"),
        ([user(good[:-40], "What?")], {}, "messages[0].content[0]"),
        ([user("file:///etc/passwd", "What?")], {}, "messages[0].content[0]"),
        ([user(*[good] * 9)], {}, "messages"),
        ([user("word " * 300)], {}, "messages"),
        ([user("Hi")], {"max_tokens": 250}, "messages"),
        ([user("a <image> here")], {}, "messages"),
    ]
    for messages, options, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(served, *messages, **options)
        assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(served, user("word " * 300))
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="files are not read") as refused:
        served.client().chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}],
        )
    assert post(served, b"{").json()["error"]["message"].startswith("the body is no JSON")
    assert ask(served, user(good, "What?")).choices[0].message.content
    log: list[str] = []
    line = r"^chat 200 \d+\.\d\ds images=1 prompt=\d+ answer=12 finish=length$"

    def it_is_logged() -> bool:  # which comes after the answer has gone out
        log.append(capsys.readouterr().err)
        return re.search(line, "".join(log), re.MULTILINE) is not None

    until(it_is_logged)
    assert "word" not in "".join(log) and "What" not in "".join(log)  # no text of prompts


def test_sizes_are_limited(ours, parts: Path, serving) -> None:
    picture = parts / "data" / "1.png"
    size = picture.stat().st_size
    served = serving(ours, bounds=Bounds(images=2, pictures=PictureLimits(size - 9, files=False)))
    with pytest.raises(openai.BadRequestError, match="more than the") as refused:
        ask(served, user("Hi", picture))
    assert refused.value.param == "messages[0].content[1]"
    large = post(served, b'{"messages": "' + b"x" * 1_100_000 + b'"}')
    assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
    served = serving(ours, bounds=Bounds(images=2, pictures=PictureLimits(size, files=False)))
    assert ask(served, user("Hi", picture)).choices


@pytest.fixture
def web(parts: Path):
    """An address on this machine that has the pictures."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(parts / "data"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_pictures_from_the_web(ours, parts: Path, serving, web: str) -> None:
    open_to_all = serving(ours, bounds=Bounds(pictures=PictureLimits(private=True, files=False)))
    by_url, by_bytes = (
        ask(open_to_all, user(picture, "What?")).choices[0].message.content
        for picture in (f"{web}/1.png", parts / "data" / "1.png")
    )
    assert by_url == by_bytes != ""
    with pytest.raises(openai.BadRequestError, match="404") as refused:
        ask(open_to_all, user(parts / "data" / "1.png", f"{web}/nothing.png"))
    assert refused.value.param == "messages[0].content[1]"
    with pytest.raises(openai.BadRequestError, match="not public"):
        ask(serving(ours), user(f"{web}/1.png", "What?"))
    with pytest.raises(openai.BadRequestError, match="URLs are not read"):
        closed = serving(ours, bounds=Bounds(pictures=PictureLimits(urls=False, files=False)))
        ask(closed, user(f"{web}/1.png", "What?"))


def held(served: Served) -> Event:
    """Keeps the model busy until the event is set."""
    from llava_train.inference import Prompt, message

    begun, free = Event(), Event()

    def emit(event: object) -> None:
        begun.set()
        assert free.wait(WAIT_S)

    served.engine.submit(Job(Prompt((message("user", "Hi"),)), Sampling(), 1, emit))
    assert begun.wait(WAIT_S)
    return free


def until(true) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_sends_others_away(ours, serving) -> None:
    served = serving(ours, max_batch=1, max_queue=1)
    free = held(served)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, served, user("Hi")) for _ in range(2)]
        until(lambda: served.engine.waiting == 2)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(served, user("Hi"))
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        assert refused.value.code == "queue_full"
        free.set()
        assert [each.result().choices[0].finish_reason for each in waiting] == ["length"] * 2
    assert ask(served, user("Hi")).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(ours, serving, stream: bool, capsys) -> None:
    served = serving(ours, max_batch=1, max_queue=1)
    steps: list[float] = []

    def slowly(*_: object) -> None:
        steps.append(time.monotonic())
        if len(steps) > 3:
            time.sleep(0.1)  # all of it would take 15 s

    hook = ours.model.register_forward_pre_hook(slowly)
    body = {"messages": [user("Hi")], "max_tokens": 150, "stream": stream}
    with httpx.Client(trust_env=False) as client:
        if stream:
            with client.stream("POST", served.url + COMPLETIONS, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(served.url + COMPLETIONS, json=body, timeout=0.5)
    until(lambda: not served.engine.running)
    hook.remove()
    assert len(steps) < 100
    assert ask(served, user("Hi")).choices[0].finish_reason == "length"
    said: list[str] = []

    def both_are_logged() -> bool:  # which comes after the answer has gone out
        said.extend(re.findall(r"^chat .*$", capsys.readouterr().err, re.MULTILINE))
        return len(said) == 2

    until(both_are_logged)
    first, second = sorted(said, key=lambda line: "answer=" in line)
    assert "answer=" not in first and "answer=12" in second


def test_who_goes_while_waiting_leaves_the_queue(ours, serving) -> None:
    served = serving(ours, max_batch=1)
    free = held(served)
    with pytest.raises(openai.APITimeoutError):
        served.client().with_options(timeout=0.5).chat.completions.create(model="tiny", messages=[user("Hi")])
    until(lambda: not served.engine.waiting)
    free.set()


def test_a_model_that_fails_is_an_error_of_the_server(served: Served, ours) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel")

    hook = ours.model.register_forward_pre_hook(fail)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            ask(served, user("Hi"), stream=stream)
    steps: list[int] = []
    hook.remove()
    hook = ours.model.register_forward_pre_hook(lambda *_: steps.append(0) or (fail() if len(steps) > 5 else None))
    with pytest.raises(openai.APIError, match="the model failed"):  # in the middle of a stream
        list(ask(served, user("Hi"), stream=True))
    hook.remove()
    assert ask(served, user("Hi")).choices
