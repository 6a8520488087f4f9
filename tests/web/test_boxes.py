import numpy as np
import pytest
from PIL import Image

from llava_train.web.boxes import Box, Frame, boxes_in, draw

SQUARE = Frame(100, 100)
BOX = Box("", 0.1, 0.2, 0.5, 0.8)


def approx(boxes: list[Box]) -> list[tuple]:
    return [(box.label, *(round(each, 4) for each in (box.x1, box.y1, box.x2, box.y2))) for box in boxes]


@pytest.mark.parametrize(
    ("text", "frame", "expected"),
    [
        ("[0.1, 0.2, 0.5, 0.8]", SQUARE, [("", 0.1, 0.2, 0.5, 0.8)]),
        ("A man[0.100,0.200,0.500,0.800] rides.", SQUARE, [("A man", 0.1, 0.2, 0.5, 0.8)]),
        (
            "Two dogs[0.1,0.2,0.5,0.8;0,0,1,0.5] run. The ball [0.1, 0.2, 0.3, 0.4]",
            SQUARE,
            [("Two dogs", 0.1, 0.2, 0.5, 0.8), ("Two dogs", 0, 0, 1, 0.5), ("The ball", 0.1, 0.2, 0.3, 0.4)],
        ),
        (
            "<ref> the dog </ref><box>(100,200),(500,800)</box><box>(0,0),(1000,500)</box>, <box>(1,2),(3,4)</box>",
            SQUARE,
            [("the dog", 0.1, 0.2, 0.5, 0.8), ("the dog", 0, 0, 1, 0.5), ("the dog", 0.001, 0.002, 0.003, 0.004)],
        ),
        (
            "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,200),(500,800)<|box_end|> and "
            "<|box_start|>(0,0), (10,10)<|box_end|>",
            SQUARE,
            [("a cat", 0.1, 0.2, 0.5, 0.8), ("and", 0, 0, 0.01, 0.01)],
        ),
        (
            "a cat(100,200),(500,800)(0,0),(10,10)\nred hat(1,2),(3,4)",  # as it is left when marks are not decoded
            Frame(100, 100, marked=False),
            [("a cat", 0.1, 0.2, 0.5, 0.8), ("a cat", 0, 0, 0.01, 0.01), ("red hat", 0.001, 0.002, 0.003, 0.004)],
        ),
        (
            '```json\n[{"bbox_2d": [14, 28, 56, 84], "label": "a {cat"},\n '
            '{"label": "b", "bbox_2d": [0, 0, 70.5, 42]}, {"bb',
            Frame(100, 50, scale=(140, 84)),
            [("b", 0, 0, 0.5036, 0.5)],  # a label with a brace is not read
        ),
        ('{"bbox_2d": [0.5, 0.5, 1, 1], "label": "tiny"}', SQUARE, [("tiny", 0.0005, 0.0005, 0.001, 0.001)]),
    ],
)
def test_every_way_to_write_a_box(text: str, frame: Frame, expected: list) -> None:
    assert approx(boxes_in(text, frame)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[0.5, 0.2, 0.1, 0.8] [0.1, 0.8, 0.5, 0.2] [0.1, 0.2, 0.1, 0.8]",  # inverted, empty
        "[0.1, 0.2, 1.5, 0.8] [-0.1, 0.2, 0.5, 0.8]",  # beyond the picture
        "[0.1, 0.2, 0.5] [0.1, 0.2, 0.5, 0.8, 0.9] [0.1 0.2 0.5 0.8] [0.1, 0.2, 0.5, 0.8",  # malformed
        "[0, 0, 1, 1] and [1, 2, 3, 4]",  # a list of numbers
        "from (10,20),(30,40)",  # a pair of points, and no mark says that it is a box
        "<box>(500,200),(100,800)</box> <box>(100,200),(500,1001)</box> <box>(1,2)</box> <box>(1,2),(3,4),(5,6)</box>",
        "<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
        '{"bbox_2d": [1, 2, 3]} {"bbox_2d": "1,2,3,4"} {"bbox_2d": [1, 2, "3", 4]} {bbox_2d: [1, 2, 3, 4]} [1]',
        '{"bbox_2d": [true, 2, 3, 4]} {"bbox_2d": [5, 2, 1, 4]} {"bbox_2d": [0, 0, 1001, 10]}',
        "",
    ],
)
def test_what_is_no_box_is_left_out(text: str) -> None:
    assert boxes_in(text, SQUARE) == []


def test_hostile_text_is_read_in_no_time() -> None:
    for piece in ("[0.1,", "{", "(1,2),", "<ref>", "<box>(", "[0.1,0.2,0.3,0.4;", "1" * 9, '{"bbox_2d": [[', " "):
        assert boxes_in(piece * (100_000 // len(piece)), SQUARE) == []


@pytest.mark.parametrize(
    ("size", "written", "expected"),
    [
        # A wide picture lies in the middle of its square: a quarter of it is border, above and below.
        ((200, 100), "[0.5, 0.25, 1, 0.75]", (0.5, 0, 1, 1)),
        ((200, 100), "[0, 0.5, 0.5, 0.75]", (0, 0.5, 0.5, 1)),
        ((100, 200), "[0.25, 0.5, 0.5, 1]", (0, 0.5, 0.5, 1)),
        ((100, 100), "[0.25, 0.5, 0.5, 1]", (0.25, 0.5, 0.5, 1)),
        ((200, 100), "[0.1, 0.1, 0.5, 0.5]", (0.1, 0, 0.5, 0.5)),  # what reaches into the border is cut
        ((200, 100), "[0.1, 0, 0.5, 0.2]", None),  # only border
    ],
)
def test_fractions_of_a_padded_square_are_mapped_back(size, written, expected) -> None:
    boxes = boxes_in(written, Frame(*size, padded=True))
    assert approx(boxes) == ([("", *expected)] if expected else [])


def test_thousandths_are_of_the_picture_itself() -> None:
    text = "<box>(100,200),(500,800)</box>"
    assert boxes_in(text, Frame(200, 100, padded=True)) == boxes_in(text, SQUARE) == [BOX]


@pytest.mark.parametrize("ground", ["black", "white", "#e69f00", "#777777"])
def test_a_box_is_drawn_where_it_is_and_stands_out(ground: str) -> None:
    image = Image.new("RGB", (800, 600), ground)
    drawn = draw(image, [BOX])
    assert drawn.size == image.size
    changed = np.abs(np.asarray(drawn.convert("L"), int) - np.asarray(image.convert("L"), int)) > 100
    rows, columns = np.where(changed.any(1))[0], np.where(changed.any(0))[0]
    assert abs(columns[0] - 80) < 12 and abs(columns[-1] - 400) < 12
    assert abs(rows[0] - 120) < 12 and abs(rows[-1] - 480) < 12
    assert not changed[200:400, 120:360].any()  # what is in the box can be seen
    assert np.asarray(image).std((0, 1)).max() == 0  # the picture itself is as it was


def test_labels_stay_on_the_picture_and_small_pictures_are_enlarged() -> None:
    boxes = [Box("a very long label indeed", 0.9, 0, 1, 0.1), Box("b", 0, 0.5, 0.5, 1)]
    drawn = draw(Image.new("L", (64, 32)), boxes)
    assert (drawn.size, drawn.mode) == ((512, 256), "RGB")
    plain = draw(Image.new("L", (64, 32)), [Box("", *(box.x1, box.y1, box.x2, box.y2)) for box in boxes])
    written = np.abs(np.asarray(drawn, int) - np.asarray(plain, int)).max(-1) > 60
    assert written[:40, 200:440].any() and written[90:].any()
    assert draw(Image.new("RGB", (1, 2000)), [Box("thin", 0, 0, 1, 1)]).size == (1, 2000)
