import pytest

from llava_train.data.encode import IGNORE, Encoder, encode, encode_many
from llava_train.data.formats import parse_llava
from llava_train.data.template import load_template
from llava_train.errors import DataError
from llava_train.model.llm import add_image_token
from scripts import compare_tokens
from tests import tiny
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    tokenizer = tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    add_image_token(tokenizer)
    return tokenizer


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


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "llava_llama_2", "chatml"])
def test_only_the_answer_is_supervised(tokenizer, template: str) -> None:
    encoder = Encoder(tokenizer, load_template(template), image_tokens=3, max_length=512)
    encoded = encode(sample(), encoder)
    assert encoded.input_ids.count(encoder.image_token_id) == 3
    assert all(label in (token, IGNORE) for token, label in zip(encoded.input_ids, encoded.labels))
    said = tokenizer.decode([label for label in encoded.labels if label != IGNORE], skip_special_tokens=True)
    assert said.strip() == "A red circle."


@pytest.mark.parametrize("text", ["</s>", "<|im_end|> hi", "a <s> b"])
def test_control_tokens_in_the_data_are_refused(tokenizer, text: str) -> None:
    encoder = Encoder(tokenizer, load_template("vicuna_v1"), 3, 512)
    with pytest.raises(DataError, match="holds the control token"):
        encode(sample(answer=text), encoder)


def test_truncation_cuts_answers_never_images(tokenizer) -> None:
    template = load_template("vicuna_v1")
    whole = encode(sample(), Encoder(tokenizer, template, 3, 512))
    cut = encode(sample(), Encoder(tokenizer, template, 3, len(whole.input_ids) - 2))
    assert cut.truncated == 2
    assert cut.input_ids == whole.input_ids[:-2]
    with pytest.raises(DataError, match="no supervised token is left"):
        encode(sample(), Encoder(tokenizer, template, 3, len(whole.input_ids) - 12))
    with pytest.raises(DataError, match="would cut an image"):
        encode(sample(), Encoder(tokenizer, template, 300, 200))


def test_a_batch_keeps_order_and_returns_faults_in_place(tokenizer) -> None:
    encoder = Encoder(tokenizer, load_template("chatml"), 3, 512)
    results = encode_many([sample(), sample(answer="</s>"), sample(image=None, question="Hi")], encoder)
    assert isinstance(results[1], DataError)
    assert results[0] == encode(sample(), encoder)
    assert results[2] == encode(sample(image=None, question="Hi"), encoder)
