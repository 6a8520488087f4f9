"""Target `gguf`: a model for llama.cpp and Ollama."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from llava_train.exporters.gguf import llama_cpp
from llava_train.exporters.gguf.chat import MARKER, chat_template
from llava_train.exporters.gguf.llm import add_llm, kind_of, llm_entries, llm_refusal
from llava_train.exporters.gguf.modelfile import Pieces, Turns, derive, modelfile
from llava_train.exporters.gguf.tokenizer import add_tokenizer, begins_with_bos, ends, tokenizer_refusal
from llava_train.exporters.gguf.vision import add_vision, vision_entries, vision_refusal
from llava_train.exporters.gguf.writing import gguf_package, round_as_stored, write_file
from llava_train.exporters.huggingface import connector_refusal, stock_refusal
from llava_train.exporters.quantize import TOLERANCE as ROUNDED
from llava_train.exporters.quantize import to_precision
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import GREEDY_TOKENS, QUESTION, TOLERANCE, Asked, Reference, answers_of, compare
from llava_train.inference import message, render
from llava_train.model.assemble import Assembly
from llava_train.model.llm import IMAGE_TOKEN

MODEL, MMPROJ, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
_QUANTISED_FILES = {"int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}
_READ_BACK = Path(__file__).parent / "read_back.py"
_CLASS_EMBEDDING = (
    "llama.cpp puts CLIP's class embedding behind the patches and leaves out the first patch instead of it "
    "(ggml-org/llama.cpp#25814): features reach the language model one place early. SigLIP has no such embedding and "
    "is exact. The file is written for that order; where llama.cpp comes to change it, export again"
)
_PIXELS = (
    "llama.cpp fits a picture into the square (bicubic) and pads it with one colour, whatever training did; a square "
    "picture of the encoder's size is read as in training"
)


class Gguf(Target):
    """`model.gguf`, `mmproj.gguf` and a `Modelfile`."""

    summary = "GGUF files for llama.cpp and Ollama: one-picture LLaVA on CLIP or SigLIP, linear or two-layer connector"
    quantizes = ("int8", "int4")

    def missing(self, request: Request) -> str | None:
        """What writes the files."""
        if find_spec("gguf") is not None:
            return None
        return "GGUF files are written with the gguf package, which is not installed: pip install 'llava-train[gguf]'"

    def refusal(self, assembly: Assembly) -> str | None:
        """What llama.cpp has no graph, or no proven one, for."""
        kind = type(assembly.model).__name__
        if kind != "LlavaForConditionalGeneration" or assembly.spec.architecture != "llava":
            return f"llama.cpp's LLaVA reads one square picture, not what a {assembly.spec.architecture} model reads"
        reasons = (stock_refusal, connector_refusal, vision_refusal, llm_refusal, tokenizer_refusal)
        return next((why for why in (reason(assembly) for reason in reasons) if why is not None), None)

    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """Both files, and Ollama's."""
        gguf = gguf_package()
        prompt = render(assembly, [message("user", QUESTION, 1)])
        adds_bos = begins_with_bos(assembly, prompt)
        kind = _QUANTISED_FILES[request.quantize] if request.quantize else _FILE_TYPES[request.dtype]
        writer = gguf.GGUFWriter(None, kind_of(assembly).architecture)
        writer.add_file_type(gguf.LlamaFileType[kind])
        add_llm(writer, assembly)
        add_tokenizer(writer, assembly, adds_bos)
        template = chat_template(assembly)
        if template is not None:
            writer.add_chat_template(template)
        write_file(folder / MODEL, writer, llm_entries(assembly), request)
        writer = gguf.GGUFWriter(None, "clip")
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[request.dtype]])
        add_vision(writer, assembly)
        write_file(folder / MMPROJ, writer, vision_entries(assembly), request)
        stops = assembly.tokenizer.convert_ids_to_tokens(ends(assembly))
        bos = str(assembly.tokenizer.bos_token) if adds_bos else ""
        text = modelfile(MODEL, MMPROJ, pieces_of(assembly, bos), stops)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        if request.quantize:
            to_precision(assembly.model, torch.float32)  # what a reader unpacks has more digits than `request.dtype`
            round_as_stored(llm_entries(assembly), request)

    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Read both files back into transformers' classes with the gguf package, by its own names of tensors.
        Quantised ones are compared with the model rounded alike."""
        tolerance = ROUNDED if request.quantize else TOLERANCE[request.dtype]
        read, found = _read_back(folder, reference)
        report = compare(reference, found, tolerance, read.pop("faults"))
        return {**report, **_in_llama_cpp(folder, reference, read), **read, "notes": _notes(folder, read)}


def pieces_of(assembly: Assembly, bos: str) -> Pieces | None:
    """A model's template as Ollama can have it: without the BOS that Ollama writes itself."""

    def prompt(turns: Turns) -> str:
        return render(assembly, [message(role, text) for role, text in turns])

    pieces = derive(prompt)
    return pieces.without(bos) if pieces is not None else None


def _read_back(folder: Path, reference: Reference) -> tuple[dict[str, Any], dict[str, Asked]]:
    """What the script of that name says of itself, and its answers. Raises ExportError if it fails."""
    prompts = json.dumps({name: asked.prompt for name, asked in reference.asked.items()})

    def command(picture: Path, out: Path) -> list[str]:
        own = [str(folder.absolute()), str(picture), QUESTION, prompts, str(out)]
        return [sys.executable, "-I", str(_READ_BACK), *own]

    said, found = answers_of(command, reference.image, "the GGUF files cannot be read back")
    del said["prompts"]
    return said, found


def _in_llama_cpp(folder: Path, reference: Reference, read: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's answers beside transformers', where it is at hand. Raises ExportError if it cannot read the files."""
    answers, bos, modules = read.pop("answers"), read.pop("bos"), llama_cpp.runtime()
    if modules is None:
        return {}
    equal = {}
    with TemporaryDirectory() as scratch:
        picture = Path(scratch) / "probe.png"
        reference.image.save(picture)
        for name, asked in reference.asked.items():
            prompt = asked.prompt.removeprefix(bos).replace(IMAGE_TOKEN, MARKER)
            job = {"prompt": prompt, "tokens": GREEDY_TOKENS, "probabilities": 0}
            own = {"picture": str(picture)} if name == "image" else {}
            equal[name] = llama_cpp.ask(modules, folder, {**job, **own})["text"] == answers[name]
    return {"asked": llama_cpp.version(modules), "llama_cpp_answers_equal": equal}


def _notes(folder: Path, read: Mapping[str, Any]) -> list[str]:
    """What the report tells people: where llama.cpp differs from training, and what the files lack."""
    notes = [_PIXELS]
    if read["class_embedding"]:
        notes.append(_CLASS_EMBEDDING)
    if not read["chat_template"]:
        notes.append("the template drops what users say, so there is no chat template in the file: use raw prompts")
    if "TEMPLATE" not in (folder / MODELFILE).read_text(encoding="utf-8"):
        notes.append("the template has no equivalent in Ollama's language: the Modelfile has no TEMPLATE")
    return notes
