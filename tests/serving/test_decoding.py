import random

import pytest
import torch

from llava_train.serving.decoding import Detokenizer, Row, Sampling, Stops, draw
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_pieces_make_the_whole_text(tokenizer) -> None:
    """Random ids of a byte-level vocabulary: broken characters, whole ones of several tokens, control tokens."""
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 40))]
        ids += tokenizer("crème 火🙂 x", add_special_tokens=False)["input_ids"] if rng.random() < 0.5 else []
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(token) for token in ids]
        assert "".join(pieces) + detokenizer.rest() == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_comes_when_it_is_whole(tokenizer) -> None:
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert [piece for piece in map(detokenizer.push, ids) if piece] == ["a", "🙂", "b"]


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("  It is red. ### USER", ("###",), "It is red."),
        ("It is ## red #", ("###",), "It is ## red #"),
        ("ab aab aaab", ("aaab",), "ab aab"),
        ("one\ntwo", ("\n", "two"), "one"),
        ("\nstopped at once", ("\n",), ""),
        ("xyz", ("z", "yz"), "x"),
        (" spaces  inside ", (), "spaces  inside"),
    ],
)
def test_stops_cut_wherever_the_pieces_end(text: str, stops: tuple[str, ...], kept: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(text) + 1), rng.randrange(5)))
        cutter, given = Stops(stops), ""
        for piece in [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]:
            given += cutter.push(piece)
            assert kept.startswith(given)  # nothing given out is taken back
            if cutter.hit:
                break
        assert (given if cutter.hit else given + cutter.rest()) == kept
        assert cutter.hit == any(stop in text for stop in stops)


def test_draws() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, -torch.inf])

    def drawn(sampling: Sampling) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        return [draw(scores, sampling, generator) for _ in range(600)]

    assert set(drawn(Sampling(temperature=0.0))) == set(drawn(Sampling(temperature=1e-30))) == {1}
    assert set(drawn(Sampling(temperature=2.0, top_p=1e-9))) == {1}
    for temperature in (0.5, 2.0):
        seen = torch.bincount(torch.tensor(drawn(Sampling(temperature=temperature))), minlength=4) / 600
        torch.testing.assert_close(seen, (scores / temperature).softmax(-1), atol=0.07, rtol=0)
    # 3.0 and 2.0 have 0.67 and 0.24 of it: the second is needed for 0.7, the third for 0.95
    assert set(drawn(Sampling(temperature=1.0, top_p=0.6))) == {1}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.7))) == {1, 2}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.95))) == {0, 1, 2}


def test_a_row_tells_the_likeliest_tokens_and_ends_once(tokenizer) -> None:
    events: list[object] = []
    row = Row(Sampling(logprobs=2), 3, {tokenizer.eos_token_id}, tokenizer, events.append)
    scores = torch.zeros(len(tokenizer))
    token = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    scores[token] = 9.0
    row.take(token, scores)
    row.take(tokenizer.eos_token_id, scores)
    piece, end = events
    entry = piece.logprobs[0]
    assert (entry["token"], entry["bytes"], len(entry["top_logprobs"])) == ("a", [97], 2)
    assert entry["logprob"] == pytest.approx(float(scores.log_softmax(-1)[token]))
    assert entry["top_logprobs"][0]["token"] == "a"
    assert (end.reason, end.tokens) == ("stop", 2)
    assert row.done
