"""Import a folder in the original layout, ask it the probe's questions and export it once more, for a fresh process.

    python -m llava_train.exporters.original.probe FOLDER OUT.safetensors

Writes ids, logits and greedy tokens (`image.*`, `text.*`); prints one JSON: prompts, the class, how many columns of
the logits were loaded rather than drawn, and which tensors of the folder an export would write otherwise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_train.exporters.original.layout import connector_tensors, model_tensors
from llava_train.exporters.verify import reference_of
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import load_model
from llava_train.model.originals.config import ADAPTERS, NON_LORA, PROJECTOR, TOWER
from llava_train.model.originals.weights import stored, weight_files
from llava_train.model.tuning import PEFT_PREFIX


def main(folder: Path, out: Path) -> None:
    """See the head of this file."""
    assembly = load_model(folder)
    answers = reference_of(assembly)
    # What an import drew is the model's own only where it would be drawn again, that is for a whole model.
    whole = not (folder / PROJECTOR).exists() and not (folder / ADAPTERS).exists()
    rows = int(assembly.model.get_input_embeddings().weight.shape[0])
    columns = rows if whole else min(rows, assembly.old_vocabulary)
    tensors = {}
    for name, asked in answers.asked.items():
        tensors[f"{name}.ids"] = torch.tensor(asked.ids)
        tensors[f"{name}.logits"] = asked.logits[:, :columns].contiguous()
        tensors[f"{name}.greedy"] = torch.tensor(asked.greedy)
    save_file(tensors, str(out))
    compared, differing = _compare(assembly, folder, whole)
    result = {
        "prompts": {name: asked.prompt for name, asked in answers.asked.items()},
        "class": type(assembly.model).__name__,
        "columns": columns,
        "compared": compared,
        "differing": differing,
    }
    print(json.dumps(result))


def _compare(assembly: Assembly, folder: Path, whole: bool) -> tuple[int, list[str]]:
    """How many tensors of the folder were compared with those of another export, and the names of those that differ."""
    partial = [name for name in (PROJECTOR, NON_LORA) if (folder / name).exists()]
    source = stored(folder, weight_files(folder) if whole else partial)
    tower = any(TOWER in key for key in source.files)
    again = model_tensors(assembly, tower) if whole else connector_tensors(assembly)
    differing = sorted(again.keys() ^ {key.removeprefix(PEFT_PREFIX) for key in source.files})
    for file in set(source.files.values()):
        for key, tensor in source.tensors(file).items():
            other = again.get(key.removeprefix(PEFT_PREFIX))
            if other is not None and not torch.equal(other.to(tensor.dtype), tensor):
                differing.append(key)
    return len(source.files), differing


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
