import numpy as np
import pytest

from llava_train.data.encode import IGNORE, Encoded, Encoder, encode, encode_many, expand, messages_of
from llava_train.data.records.formats import parse_llava
from llava_train.data.templates.template import load_template, template_names
from llava_train.errors import RecordError
from llava_train.model.llm import add_image_token
from scripts import compare_tokens
from tests import tiny
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    tokenizer = tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    add_image_token(tokenizer)
    return tokenizer


RECORD = {
    "id": "two",
    "conversations": [
        {"from": "human", "value": "First <image> and <image>?"},
        {"from": "gpt", "value": "Two."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "yes"},
    ],
}


def sample(question: str = "<image>\nWhat is it?", answer: str = "A red circle.", image: str | None = "a.png"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return parse_llava({"id": "a", "conversations": turns, **({"image": image} if image else {})}, "f[0]")


def test_all_golden_vectors_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_tokens.main([str(GOLDEN / "tokens/vectors.jsonl"), str(GOLDEN / "tokens")]) == 0
    assert '"vectors": 68, "equal": 68' in capsys.readouterr().out


def test_compare_tokens_finds_a_difference(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (GOLDEN / "tokens/vectors.jsonl").read_text().splitlines()[0]
    (tmp_path / "v.jsonl").write_text(line.replace('"labels": [-100', '"labels": [1'))
    assert compare_tokens.main([str(tmp_path / "v.jsonl"), str(GOLDEN / "tokens")]) == 1
    assert '"in": "labels", "at": 0' in capsys.readouterr().out
    assert compare_tokens.main([str(tmp_path / "none"), str(GOLDEN / "tokens")]) == 2


def expanded(encoded: Encoded, encoder: Encoder) -> tuple[list[int], list[int]]:
    ids, labels = expand(encoded.input_ids, encoded.spans, encoded.image_tokens, encoder.image_token_id)
    assert len(ids) == len(labels) == encoded.length
    assert encoded.supervised == (labels[1:] != IGNORE).sum()
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize("template", template_names())
def test_only_the_answer_is_supervised(tokenizer, template: str) -> None:
    encoder = Encoder(tokenizer, load_template(template), image_tokens=3, max_length=512)
    ids, labels = expanded(encode(sample(), encoder), encoder)
    assert ids.count(encoder.image_token_id) == 3
    assert all(label in (token, IGNORE) for token, label in zip(ids, labels))
    said = tokenizer.decode([label for label in labels if label != IGNORE], skip_special_tokens=True)
    assert said.strip().startswith("A red circle.")


@pytest.mark.parametrize("template", template_names())
def test_expanding_ids_equals_expanding_the_text(tokenizer, template: str) -> None:
    """`<image>` repeated in the text before it is tokenised gives the ids that `expand` gives."""
    encoder = Encoder(tokenizer, load_template(template), image_tokens=5, max_length=1024)
    both = parse_llava({**RECORD, "image": ["a.png", "b.png"]}, "f[0]")
    ids, labels = expanded(encode(both, encoder), encoder)
    messages = [{**m, "content": m["content"].replace("<image>", "<image>" * 5)} for m in messages_of(both)]
    whole = tokenizer.apply_chat_template(
        messages, chat_template=encoder.template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == whole["input_ids"]
    assert labels == [t if said else IGNORE for t, said in zip(whole["input_ids"], whole["assistant_masks"])]


@pytest.mark.parametrize("text", ["</s>", "<|im_end|> hi", "a <s> b"])
def test_control_tokens_in_the_data_are_refused(tokenizer, text: str) -> None:
    encoder = Encoder(tokenizer, load_template("vicuna_v1"), 3, 512)
    with pytest.raises(RecordError, match="holds the control token"):
        encode(sample(answer=text), encoder)


def test_truncation_cuts_answers_never_images(tokenizer) -> None:
    template = load_template("vicuna_v1")
    whole = encode(sample(), Encoder(tokenizer, template, 3, 512))
    cut = encode(sample(), Encoder(tokenizer, template, 3, whole.length - 2))
    assert (cut.truncated, cut.length) == (2, whole.length - 2)
    assert cut.input_ids.tolist() == whole.input_ids[:-2].tolist()
    with pytest.raises(RecordError, match="no supervised token is left") as caught:
        encode(sample(), Encoder(tokenizer, template, 3, whole.length - 12))
    assert caught.value.cause == "nothing_supervised"
    for length in (1, 200):
        with pytest.raises(RecordError, match="would cut an image") as caught:
            encode(sample(), Encoder(tokenizer, template, 300, length))
        assert caught.value.cause == "image_cut"


def test_text_that_is_no_text_is_named(tokenizer) -> None:
    encoder = Encoder(tokenizer, load_template("chatml"), 3, 512)
    with pytest.raises(RecordError, match="not valid Unicode"):
        encode(sample(answer="half \ud83d of it"), encoder)


def test_a_batch_keeps_order_and_returns_faults_in_place(tokenizer) -> None:
    encoder = Encoder(tokenizer, load_template("chatml"), 3, 512)
    results = encode_many([sample(), sample(answer="</s>"), sample(image=None, question="Hi")], encoder)
    assert isinstance(results[1], RecordError)
    for result, alone in ((results[0], sample()), (results[2], sample(image=None, question="Hi"))):
        np.testing.assert_array_equal(result.input_ids, encode(alone, encoder).input_ids)
        np.testing.assert_array_equal(result.spans, encode(alone, encoder).spans)
