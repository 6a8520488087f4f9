from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llava_train.arguments import EXPORT_TARGETS
from llava_train.exporters.backends import BACK_ENDS, ExportFacts, readers
from llava_train.exporters.card import card, runs_of, shown_source
from llava_train.exporters.licences import DATA, PARTS, UNKNOWN, data_licence, part_licence
from llava_train.exporters.table import TARGETS
from llava_train.model.checkpoint import model_folder
from llava_train.model.spec import PartSource, read_spec

REPORT = {
    "target": "hf",
    "dtype": "bfloat16",
    "quantize": None,
    "max_logit_difference": {"image": 0.001, "text": 0.0005},
    "back_ends": [{"name": "vLLM", "command": "vllm serve x"}, {"name": "LMDeploy", "why": "it has no such tower"}],
}


def test_a_card_says_how_to_chat_what_it_was_trained_on_and_whose_it_is(finished: Path) -> None:
    text = card("mine", finished, read_spec(model_folder(finished)), REPORT)
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "base_model" not in front  # parts of this machine mean nothing elsewhere
    for line in (
        "# mine",
        "* vLLM: `vllm serve x`",
        "* not LMDeploy: it has no such tower.",
        "differ by at most 1.0e-03",
    ):
        assert line in text
    (run,) = runs_of(finished)
    assert f"{run.name}: {run.steps} steps, loss {run.loss:.4g}" in text
    assert f"| learning rate | {run.recipe['optimization']['learning_rate']:g} |" in text
    assert "| language model | lora |" in text
    assert f"| LoRA rank | {run.recipe['tune']['lora']['r']} |" in text
    assert str(finished.parent) not in text


def test_published_parts_are_named_with_their_licences(finished: Path) -> None:
    spec = replace(
        read_spec(model_folder(finished)),
        vision=PartSource("google/siglip-so400m-patch14-384"),
        llm=PartSource("Qwen/Qwen2-7B-Instruct"),
    )
    text = card("mine", finished, spec, REPORT)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == ["google/siglip-so400m-patch14-384", spec.llm.path]
    assert "| language model `Qwen/Qwen2-7B-Instruct` | Apache-2.0 |" in text


def test_what_was_measured_of_a_quantised_model_stands_in_the_card(finished: Path) -> None:
    held_out = {"records": 500, "metric": "exact_match", "before": 0.9912, "after": 0.9875}
    held_out["data"] = "questions.json"
    report = {**REPORT, "quantize": "int4", "rounding": {"max_logit_difference": {"image": 0.087, "text": 0.294}}}
    report |= {"held_out": {**held_out, "loss": {"before": 0.05, "after": 0.0612}}}
    text = card("mine", finished, read_spec(model_folder(finished)), report)
    assert "exact_match on 500 held-out records (questions.json): 0.9912 before, 0.9875 after int4." in text
    assert "loss on 500 held-out records (questions.json): 0.05 before, 0.0612 after int4." in text
    assert "the trained model, rounded alike: logits differ by at most 1.0e-03" in text
    assert "Rounding to int4 moved them by up to 2.9e-01" in text
    assert "linear layers of the language model in int4" in text


def test_a_model_that_is_no_run_has_no_recipe(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("- not a recipe", encoding="utf-8")
    text = card("mine", tmp_path, read_spec(model_folder(finished)), REPORT)
    assert "exported from a folder that is no run" in text


def test_a_run_that_began_as_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{{name: a, init_from: '{tmp_path}'}}", encoding="utf-8")
    assert [run.name for run in runs_of(tmp_path)] == ["a"]


@pytest.mark.parametrize(("source", "shown"), [("a/b", "a/b"), ("/data/a/b", "b"), ("./a", "a"), ("b", "b")])
def test_paths_of_a_machine_stay_there(source: str, shown: str) -> None:
    assert shown_source(source) == shown


def test_licences(tmp_path: Path) -> None:
    assert part_licence("lmsys/vicuna-7b-v1.5") == "Llama 2 Community License"
    assert part_licence("Qwen/Qwen2.5-3B-Instruct") == "Qwen licence"
    assert part_licence(str(tmp_path)) == UNKNOWN
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert part_licence(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n", encoding="utf-8")
    assert part_licence(str(tmp_path)) == UNKNOWN  # as our own cards say until somebody knows
    assert data_licence("llava_v1_5_mix665k.json").startswith("CC-BY-4.0")
    assert data_licence("mine.json") == UNKNOWN
    assert len({pattern for pattern, _ in PARTS + DATA}) == len(PARTS + DATA)


CLIP = ExportFacts("hf", "LlavaForConditionalGeneration", "clip_vision_model", "llama", "mlp2x_gelu", None)


@pytest.mark.parametrize(
    ("export", "takes", "refuses"),
    [
        (CLIP, {"transformers", "vLLM", "LMDeploy"}, {"SGLang"}),
        (replace(CLIP, tower="siglip_vision_model"), {"vLLM"}, {"LMDeploy"}),
        (replace(CLIP, target="llava"), {"SGLang", "the original LLaVA code"}, set()),
        (replace(CLIP, target="llava", connector="linear"), {"the original LLaVA code"}, {"SGLang"}),
        (replace(CLIP, target="remote-code", connector="qformer"), {"transformers", "vLLM"}, set()),
        (replace(CLIP, target="remote-code", reads_text=True), {"transformers"}, {"vLLM"}),
        (replace(CLIP, target="adapter"), {"PEFT", "vLLM"}, set()),
        (replace(CLIP, target="adapter", whole_modules=True), {"PEFT"}, {"vLLM"}),
        (replace(CLIP, tower="dinov2"), {"transformers serve"}, {"vLLM", "LMDeploy"}),
        (replace(CLIP, connector="linear"), {"transformers"}, {"vLLM"}),
        (replace(CLIP, target="llava", llm="qwen2"), {"the original LLaVA code"}, {"SGLang"}),
        (replace(CLIP, model_class="MllamaForConditionalGeneration"), {"transformers"}, {"vLLM", "LMDeploy"}),
        (replace(CLIP, quantize="int4"), {"transformers"}, {"LMDeploy"}),
    ],
)
def test_who_reads_an_export(export: ExportFacts, takes: set[str], refuses: set[str]) -> None:
    rows = readers(export, "out")
    assert takes <= {row["name"] for row in rows if "command" in row}
    assert refuses <= {row["name"] for row in rows if "why" in row}


def test_a_model_without_a_part_for_videos_is_started_so() -> None:
    (command,) = (
        row["command"]
        for row in readers(replace(CLIP, model_class="LlavaOnevisionForConditionalGeneration"), "out")
        if row["name"] == "vLLM"
    )
    assert command == """vllm serve out --limit-mm-per-prompt '{"image": 4, "video": 0}'"""


def test_every_target_has_a_reader_and_every_command_its_target() -> None:
    named = {target for each in BACK_ENDS for target in each.commands}
    assert named == {*TARGETS} == {*EXPORT_TARGETS}
    assert all("{folder" in command for each in BACK_ENDS for command in each.commands.values())
