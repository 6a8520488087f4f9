"""Record formats: what a record means, and what is wrong with one that cannot be used."""

from typing import Any

import pytest

from llava_train.data.records.formats import FORMATS, detect, parse_llava, parse_record
from llava_train.data.sample import CAUSES, ImageRef, Sample
from llava_train.errors import DataError, RecordError

PICTURE = ImageRef("a.png")
VIDEO = ImageRef("a.mp4", "frame")


def record(*values: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "a", "conversations": turns, **fields}


def said(*values: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": value} for i, value in enumerate(values)]
    return {"id": "a", "messages": turns, **fields}


def text(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": value}


def url(value: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": value}}


def read(values: Any) -> Sample:
    return parse_record(detect(values, "x"), values, "x")


def fault(values: Any, name: str | None = None) -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse_record(name or detect(values, "x"), values, "file.json[7]")
    assert str(caught.value).startswith("file.json[7]")
    assert caught.value.cause in CAUSES
    return caught.value


def parts(values: Any) -> list[tuple[Any, ...]]:
    return [turn.parts for turn in read(values).turns]


# Detection

SEEN: list[tuple[str, Any]] = [
    ("llava", record("Hi", "Yes")),
    ("llava", {"conversations": []}),
    ("llava", {"conversations": {"from": ["human"], "value": ["Hi"]}}),
    ("sharegpt", {"conversations": said("Hi", "Yes")["messages"]}),
    ("sharegpt", {"conversations": [{"role": "user", "content": "Hi", "from": None, "value": None}]}),
    ("sharegpt", said("Hi", "Yes")),
    ("openai", said([text("Hi")], "Yes")),
    ("openai", said("Hi", [text("Yes")])),
    ("preference", {"chosen": "a", "rejected": "b", "question": "c", "answer": "d"}),
    ("preference", record("Hi", chosen={"from": "gpt", "value": "a"}, rejected={"from": "gpt", "value": "b"})),
    ("cauldron", {"images": [], "texts": [{"user": "a", "assistant": "b"}]}),
    ("cauldron", {"images": [], "texts": {"user": ["a"], "assistant": ["b"]}}),
    ("video_chatgpt", {"q": "a", "a": "b", "video_id": "c"}),
    ("vqa", {"question": "a", "answer": "b"}),
    ("caption", {"image": "a", "caption": "b"}),
    ("caption", {"__key__": "a", "__images__": [], "json": {"caption": "b"}}),
]


@pytest.mark.parametrize(("name", "values"), SEEN)
def test_a_format_is_told_by_its_keys(name: str, values: Any) -> None:
    assert detect(values, "x") == name


def test_every_format_is_told_and_has_a_title() -> None:
    assert {name for name, _ in SEEN} == set(FORMATS)
    assert len({FORMATS[name].title for name in FORMATS}) == len(list(FORMATS))


@pytest.mark.parametrize("values", [{"a": 1}, {}, [], "text", 3, None, {"conversations": 3}, {"\ud800": 1}])
def test_an_unknown_record_lists_the_formats(values: Any) -> None:
    with pytest.raises(DataError, match=r"x: format not recognised \(found .+\); known formats: ") as caught:
        detect(values, "x")
    assert all(name in str(caught.value) for name in FORMATS)
    str(caught.value).encode()


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_of_another_format_says_so(name: str) -> None:
    other = {"question": "a", "answer": "b"} if name != "vqa" else {"q": "a", "a": "b", "video_id": "c"}
    error = fault(other, name)
    assert error.cause == "wrong_format"
    assert f"cannot be read as {name}: it looks like {detect(other, 'x')}" in str(error)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("values", [None, [], "text", 3, {}, {"x": 1}])
def test_any_value_is_a_fault(name: str, values: Any) -> None:
    assert fault(values, name).cause in ("not_an_object", "no_turns", "missing_key", "malformed")


# Conversations


def test_the_image_moves_to_the_front_of_its_turn() -> None:
    sample = parse_llava(record("What is it? <image>", "A cat.", image="a.png"), "x[0]")
    assert sample.turns[0].parts == (PICTURE, "\nWhat is it?")
    assert sample.images == (PICTURE,)
    assert parse_llava(record(" <image>\n", "A cat.", image="a.png"), "x").turns[0].parts == (PICTURE,)


def test_an_opening_answer_is_dropped() -> None:
    values = {"conversations": [{"from": "gpt", "value": "Hello"}, *record("Hi", "Yes")["conversations"]]}
    assert [turn.role for turn in read(values).turns] == ["user", "assistant"]


def test_several_images_stay_where_they_stand() -> None:
    sample = read(record("<image> and <image>?", "Two.", image=["a.png", "b.png"]))
    assert sample.turns[0].parts == (PICTURE, " and ", ImageRef("b.png"), "?")
    sample = read(record("One <image>", "a", "Two <image>", "b", image=["a.png", "b.png"]))
    assert [turn.parts[0] for turn in sample.turns[::2]] == [PICTURE, ImageRef("b.png")]


def test_videos_have_their_own_marker_or_that_of_images() -> None:
    assert parts(record("What? <video>", "x", video="a.mp4"))[0] == (VIDEO, "\nWhat?")
    assert parts(record("What? <image>", "x", video="a.mp4"))[0] == (VIDEO, "\nWhat?")
    both = record("<image> in <video>?", "x", image="a.png", videos=["a.mp4"])
    assert parts(both)[0] == (PICTURE, " in ", VIDEO, "?")
    assert "1 <video> markers in the text but 0 videos" in str(fault(record("<video>", "x")))
    assert VIDEO.size == 0


def test_text_alone_and_system_texts() -> None:
    assert parts(record("Hi", "Yes")) == [("Hi",), ("Yes",)]
    key = read(record("Hi", "Yes", system="Be brief."))
    turn = read({"conversations": [{"from": "system", "value": "Be brief."}, *record("Hi", "Yes")["conversations"]]})
    assert key.turns == turn.turns and key.turns[0].role == "system"
    assert read(said("Hi", "Yes", system=None)).turns[0].role == "user"


@pytest.mark.parametrize(
    "said_by", ["tool", "function", "function_call", "observation", "robot", "User", None, 3, ["user"]]
)
def test_roles_that_are_nobodys_are_refused_by_name(said_by: Any) -> None:
    error = fault({"conversations": [{"from": said_by, "value": "x"}]}, "llava")
    assert error.cause == "role" and repr(said_by) in str(error)


BROKEN: list[tuple[Any, str, str]] = [
    ({"id": "a", "conversations": []}, "no_turns", "has no turns"),
    ({"id": "a", "conversations": None}, "no_turns", "has no turns"),
    ({"id": "a", "conversations": "x"}, "no_turns", "has no turns"),
    ({"id": "a", "conversations": [{"from": "gpt", "value": "only"}]}, "no_turns", "has no turns"),
    ({"id": "a", "conversations": ["x"]}, "malformed", "turn 0 must be an object"),
    (record("hi"), "role_order", "ends without an answer"),
    (record("hi", " "), "empty_turn", "an answer is empty"),
    (record(" ", "x"), "empty_turn", "turn 0 of the user is empty"),
    (record("<image>", "x"), "marker_count", "1 <image> markers in the text but 0 images"),
    (record("hi", "x", image="a.png"), "marker_count", "0 <image> markers in the text but 1 images"),
    (record("<image>", "<image>", image="a.png"), "marker_count", "2 <image> markers in the text but 1 images"),
    (record("<image>", "x", image=["a", "b", "c"]), "marker_count", "1 <image> markers in the text but 3 images"),
    (record("hi", "<image> x", image="a.png"), "marker_place", "an image stands in a turn of the assistant"),
    (record("hi", "x", image="a.png", system="<image>"), "marker_place", "an image stands in a turn of the system"),
    (record("<image>", "x", image=3), "malformed", "must be a path"),
    (record("<image>", "x", image=""), "malformed", "must be a path"),
    (record("<image>", "x", image=["a.png", None]), "malformed", "must be a path"),
    (record("<image>", "x", image={"bytes": None, "path": None}), "malformed", "must be a path"),
    (record("<video>", "x", video=3), "malformed", "'video' must be a path"),
    (record("<image>", "x", image="a.png", images=["b.png"]), "malformed", "'image' and 'images' name different"),
    (record("hi", "x", system=["x"]), "not_text", "must be text"),
    (record("hi", 3), "not_text", "turn 1 must have a text 'value' or 'content', not int"),
    (record("hi", {"text": "x"}), "not_text", "not dict"),
    ({"conversations": [{"from": "human"}]}, "missing_key", "text 'value'"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "role_order", "turn 1"),
    (record("hi", "x", id=[1]), "malformed", "an id must be text or a number, not list"),
    (record("hi", "x", id="\ud800"), "not_utf8", "id is not valid Unicode"),
    (said([text("hi")], "x", images=["a.png", "b.png"]), "marker_count", "0 images in the messages but 2 images"),
    (said([{"type": "image"}], "x"), "marker_count", "more images in the messages"),
    (said([{"type": "audio"}], "x"), "malformed", "a content part of type 'audio'"),
    (said(["x"], "x"), "malformed", "a content part of type None"),
    (said([text(None)], "x"), "not_text", "must be text"),
    (said([url(3)], "x"), "malformed", "must be a path"),
    (said("hi", [url("a.png")]), "marker_place", "an image stands in a turn of the assistant"),
    ({"image": "a.png", "caption": 3}, "not_text", "not int"),
    ({"image": "a.png", "caption": None}, "missing_key", "has no caption"),
    ({"image": "a.png", "caption": " "}, "empty_turn", "an answer is empty"),
    ({"caption": "x"}, "marker_count", "a caption needs one picture, found 0"),
    ({"images": ["a", "b"], "caption": "x"}, "marker_count", "found 2"),
    ({"question": "x", "answer": None}, "not_text", "not NoneType"),
    ({"question": "x", "answers": []}, "not_text", "not list"),
    ({"q": 1, "a": "x", "video_id": "v"}, "not_text", "not int"),
    ({"texts": [{"user": "a"}], "images": []}, "not_text", "not NoneType"),
    ({"texts": [{"user": "a", "assistant": "b"}, 3], "images": []}, "malformed", "list of objects"),
    ({"chosen": "a", "rejected": "b"}, "missing_key", "has no question"),
    ({"chosen": "a", "rejected": " ", "prompt": "x"}, "empty_turn", "the rejected answer is empty"),
    ({"chosen": "a", "rejected": None, "prompt": "x"}, "not_text", "not NoneType"),
    (
        {"chosen": said("x", "a")["messages"], "rejected": said("y", "a")["messages"]},
        "malformed",
        "differ before the last answer",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "cause", "expected"), BROKEN)
def test_broken_records_are_named(broken: Any, cause: str, expected: str) -> None:
    error = fault(broken, "llava" if "conversations" in broken else None)
    assert error.cause == cause
    assert expected in str(error)
    assert not error.hostile


def test_ids_are_text_or_numbers_or_the_place() -> None:
    ids = {"x": "x", 7: "7", 1.5: "1.5", 0: "0", "": "file[3]", None: "file[3]"}
    for given, expected in ids.items():
        assert parse_record("llava", record("Hi", "Yes", id=given), "file[3]").id == expected
    error = fault(record("Hi", id="\x1b[31m" + "x" * 5000))
    assert "\x1b" not in str(error) and len(str(error)) < 400


def test_content_parts() -> None:
    shown = said([text("Look "), url("a.png"), {"type": "input_text", "text": "!"}], [text("A cat.")])
    assert parts(shown) == [(PICTURE, "\nLook !"), ("A cat.",)]
    assert parts(said([{"type": "image", "text": None}, text("?")], "x", images=["a.png"]))[0] == (PICTURE, "\n?")
    assert parts(said([{"type": "image_url", "image_url": "a.png"}], "x"))[0] == (PICTURE,)
    assert parts(said([{"type": "image", "image": "a.png", "image_url": None}], "x"))[0] == (PICTURE,)
    assert parts(said([{"type": "video", "video": "a.mp4"}], "x"))[0] == (VIDEO,)
    assert parts(said([{"type": "video"}], "x", videos=["a.mp4"]))[0] == (VIDEO,)
    # A file told by its first record may hold the other spelling later.
    assert parse_record("sharegpt", shown, "x").turns == read(shown).turns
    marked = said("<image>Hi", "Yes", images=["a.png"])
    assert parse_record("openai", marked, "x").turns == parse_record("sharegpt", marked, "x").turns


def test_questions_and_captions() -> None:
    assert parts({"image": "a.png", "question": "x", "answers": ["y", "z"]}) == [(PICTURE, "\n", "x"), ("y",)]
    assert parts({"video": "a.mp4", "question": "x", "answer": "y"})[0] == (VIDEO, "\n", "x")
    assert parts({"image": "a.png", "caption": " y "}) == [(PICTURE,), ("y",)]
    assert parts({"q": "x", "a": "y", "video_id": "v"})[0] == (ImageRef("v", "frame"), "\n", "x")
    turned = {"images": ["a.png"], "texts": {"user": ["x", "z"], "assistant": ["y", "w"]}}
    assert parts(turned) == [(PICTURE, "\n", "x"), ("y",), ("z",), ("w",)]


SPAN = ImageRef("", "span", 512, 9)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ({"caption": "one"}, [(SPAN,), ("one",)]),
        ({"question": "x", "answer": "y", "image": "b.png"}, [(SPAN, "\n", "x"), ("y",)]),
        (record("<image>x", "y", image="b.png"), [(SPAN, "\nx"), ("y",)]),
        (said([{"type": "image"}, text("x")], "y"), [(SPAN, "\nx"), ("y",)]),
    ],
)
def test_samples_of_shards(inner: Any, expected: Any) -> None:
    assert parts({"__key__": "k", "__images__": [SPAN], "json": inner}) == expected
    assert read({"__key__": "k", "__images__": [SPAN], "json": {**inner, "id": None}}).id == "k"


def test_faults_of_members_are_those_of_the_sample() -> None:
    broken = RecordError("file.json[7]: broken", "not_json")
    assert fault({"__key__": "k", "json": broken}, "caption") is broken
    assert fault(broken, "llava") is broken
    assert fault({"__key__": "k", "__images__": [SPAN], "json": [1]}, "caption").cause == "missing_key"


ANSWERS = {
    "texts": ("Good.", "Bad."),
    "turns": ({"from": "gpt", "value": "Good."}, {"from": "gpt", "value": "Bad."}),
    "lists": ([{"role": "assistant", "content": "Good."}], [{"role": "assistant", "content": "Bad."}]),
    "parts": ([{"role": "assistant", "content": [text("Good.")]}], [{"role": "assistant", "content": [text("Bad.")]}]),
}
QUESTIONS: dict[str, dict[str, Any]] = {
    "rlaif_v": {"question": "What?", "image": "a.png"},
    "llama_factory": {"conversations": [{"from": "human", "value": "<image>What?"}], "images": ["a.png"]},
    "llama_factory_alpaca": {"instruction": "What?", "input": "", "image": "a.png"},
    "trl": {"prompt": [{"role": "user", "content": [{"type": "image"}, text("\nWhat?")]}], "images": ["a.png"]},
    "trl_plain": {"prompt": "What?", "images": ["a.png"]},
    "messages": {"messages": [{"role": "user", "content": "<image>\nWhat?"}], "images": ["a.png"]},
}


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_preference_layouts(question: str, answers: str) -> None:
    chosen, rejected = ANSWERS[answers]
    sample = read({"chosen": chosen, "rejected": rejected, **QUESTIONS[question]})
    assert [turn.parts for turn in sample.turns] == [(PICTURE, "\nWhat?"), ("Good.",)]
    assert sample.rejected == "Bad."


def test_a_preference_may_repeat_its_question_in_both_conversations() -> None:
    chosen, rejected = said("What?", "Good.")["messages"], said("What?", "Bad.")["messages"]
    values = {"prompt": "What?", "chosen": chosen, "rejected": rejected, "messages": chosen, "image": "a.png"}
    assert parts(values) == [(PICTURE, "\nWhat?"), ("Good.",)]
    hound = {"id": 1, "prompt": "<video>\nWhat?", "video": "a.mp4", "chosen": "a", "rejected": "b", "answer": "c"}
    assert parts(hound)[0] == (VIDEO, "\nWhat?")


def test_records_survive_any_change_of_one_value() -> None:
    """Every value of every valid record, replaced by anything: a sample or a fault with a known cause."""
    anything = (None, 0, -1.5, True, "", "x", "<image>", [], {}, [[]], {"a": []}, ["x"], [None], b"x", float("nan"))
    count = 0
    for name, values in SEEN:
        for path in paths(values):
            for value in anything:
                try:
                    assert isinstance(parse_record(name, changed(values, path, value), "x"), Sample)
                except RecordError as error:
                    assert error.cause in CAUSES and str(error).startswith("x")
                count += 1
    assert count > 500


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Where values stand in nested lists and dicts."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(key, *rest) for key in keys for rest in [(), *paths(value[key])]]


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy: Any = dict(values) if isinstance(values, dict) else list(values)
    copy[path[0]] = changed(copy[path[0]], path[1:], value) if path[1:] else value
    return copy
