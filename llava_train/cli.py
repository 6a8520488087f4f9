"""The command line: `llava-train COMMAND ...`.

Progress and logs go to stderr, results to stdout. Exit status: 0 done, 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_train import __version__
from llava_train.errors import LlavaTrainError

if TYPE_CHECKING:
    from llava_train.model.assemble import Assembly

_RECIPE_HELP = "a YAML file, e.g. configs/demo/stage1.yaml"
_OVERRIDE_HELP = "change a key of the recipe, e.g. optimization.learning_rate=2e-4 output=runs/mine"
_MODEL_HELP = "a run folder, an exported folder, or any stock LlavaForConditionalGeneration folder"

_GOES_ON = {
    "train": "; the same command goes on from the last checkpoint",
    "demo": "; the same command goes on from the last checkpoint",
    "prepare": "; the same command goes on with what is done",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's fault is one message, never a traceback (see --debug)."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    _set_environment(options.debug)
    try:
        run: Callable[[argparse.Namespace], int | None] = options.run
        return run(options) or 0
    except LlavaTrainError as error:
        if options.debug:
            raise
        print(f"llava-train {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = _GOES_ON.get(options.command, "")
        print(f"\nllava-train {options.command}: stopped{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if options.debug:
            raise
        print(f"llava-train {options.command}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1


def _set_environment(debug: bool) -> None:
    """Settings that libraries read when they are loaded, which is after this.

    Waiting threads sleep: spinning ones slow a shared machine down many times over. The libraries' notes stay
    off the screen unless asked for; their errors still come.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="llava-train",
        description="Train, fine-tune and export LLaVA-style vision-language models.",
        epilog="Start with `llava-train demo`: the whole recipe on a CPU in minutes.",
    )
    parser.add_argument("--version", action="version", version=f"llava-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_prepare, _add_inspect, _add_train, _add_evaluate, _add_export, _add_chat):
        command = add(commands)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' logs")
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="the whole recipe on an embedded default, on a CPU in minutes",
        description="Both stages on easy-vqa with the package's tiny backbones, then export, check and evaluation.\n"
        "Ends with OUT/report.json, OUT/report.html and a model to chat with.",
    )
    parser.add_argument("--out", default="runs/demo", help="folder of the runs and the report (default: %(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the steps, 512 test questions: shows the road, not the figures",
    )
    parser.set_defaults(run=_demo)
    return parser


def _add_prepare(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "prepare",
        help="check and tokenise a recipe's data before a GPU is touched",
        description="Reads, validates and tokenises everything a recipe trains on, without loading any weights.\n"
        "`train` does it when it is missing; what was prepared once is found again. Shows what each source brings,\n"
        "prints one JSON. Records that cannot be used are listed by cause; see docs/data.md.",
    )
    _recipe_arguments(parser)
    parser.add_argument("--rebuild", action="store_true", help="read and check everything again, pictures too")
    parser.set_defaults(run=_prepare)
    return parser


def _add_inspect(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "inspect",
        help="show what of each record is supervised",
        description="Shows the training records as the model sees them: supervised text green, the rest dim,\n"
        "pictures as one block. With --jsonl: one JSON a record (id, input_ids, labels, image_token_id, image_tokens).",
    )
    _recipe_arguments(parser)
    parser.add_argument("--n", type=int, help="only N records (default: 5, with --jsonl all)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--id", help="the records of this id")
    which.add_argument("--longest", action="store_true", help="the longest records (prepares the set if it is missing)")
    which.add_argument("--random", action="store_true", help="records by chance (prepares the set if it is missing)")
    parser.add_argument("--source", help="only records of the source of this name (its path, unless it has a name)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--html", metavar="FILE", help="write a page with pictures, to open in a browser")
    form.add_argument("--jsonl", action="store_true", help="machine-readable, labels unshifted, -100 unsupervised")
    parser.set_defaults(run=_inspect)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="train a recipe, or go on where it stopped",
        description="Runs a recipe to its end. The run folder (key `output`) gets metrics.jsonl, checkpoints/, best/,\n"
        "final/ and report.html. Started again on the same folder it resumes from the newest checkpoint.\n\n"
        "Several processes: torchrun --nproc_per_node 8 scripts/train.py RECIPE, or deepspeed scripts/train.py RECIPE.",
    )
    _recipe_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="start over: removes what the run folder holds")
    parser.set_defaults(run=_train)
    return parser


def _add_evaluate(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="exact match of a model's answers on records",
        description="Asks the model every record's question (all turns but the last) and compares its greedy answer\n"
        "with the last turn. Prints one JSON: exact_match, and constant_accuracy, the best that words alone can give.",
    )
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("--data", required=True, help="records, e.g. LLaVA JSON")
    parser.add_argument("--image-root", help="folder that image paths start from (default: that of --data)")
    parser.add_argument("--shuffle-images", action="store_true", help="give each question the picture of another")
    parser.add_argument("--limit", type=int, help="only the first LIMIT records")
    parser.add_argument("--batch-size", type=int, default=64, help="questions at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    parser.add_argument("--out", help="write every answer as JSONL to this file")
    _placement_arguments(parser)
    parser.set_defaults(run=_evaluate)
    return parser


def _add_export(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint that chat back ends load, and prove it",
        description="Merges adapters, writes the folder, loads it with stock transformers in a fresh process\n"
        "and compares logits and prompt. The proof lies beside the weights in export_report.json.",
    )
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--to", default="hf", help="target layout (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.set_defaults(run=_export)
    return parser


def _add_chat(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "chat",
        help="talk with a model about pictures",
        description="A conversation in the terminal; answers stream. /image PATH adds a picture, /clear starts over,\n"
        "/save FILE.json writes the conversation, /quit ends. With --prompt: one answer, then the end.",
    )
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("--image", action="append", default=[], help="a picture to begin with (can be repeated)")
    parser.add_argument("--prompt", help="ask this once and end")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    _placement_arguments(parser)
    parser.set_defaults(run=_chat)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=_RECIPE_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDE_HELP)


def _placement_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: bfloat16 on a GPU"
    )


def _load_placed(options: argparse.Namespace) -> Assembly:
    """The model on the device and in the precision asked for."""
    import torch

    from llava_train.model.checkpoint import load_model

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise LlavaTrainError("--device cuda: torch sees no GPU")
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    assembly = load_model(options.model, getattr(torch, dtype))
    assembly.model.to(device)
    return assembly


def _demo(options: argparse.Namespace) -> None:
    from llava_train.demo.run import run_demo

    run_demo(options.out, quick=options.quick)


def _prepare(options: argparse.Namespace) -> None:
    from llava_train.data.composition import composition_table
    from llava_train.recipe import load_recipe
    from llava_train.training.material import padding_of, prepare

    recipe = load_recipe(options.recipe, options.overrides)
    prepared = prepare(recipe, rebuild=options.rebuild)
    info = prepared.train.info
    print(composition_table(info), file=sys.stderr)
    hidden = ("dropped", "inputs", "image_token_id", "sources", "fingerprint")
    result = {"folder": str(prepared.train.folder), "fingerprint": info["fingerprint"]}
    result |= {key: value for key, value in info.items() if key not in hidden}
    result["sources"] = [{k: v for k, v in source.items() if k != "pieces"} for source in info["sources"]]
    result["epoch"], result["held_out"] = prepared.mixture.size, len(prepared.validation_rows)
    print(json.dumps({**result, "padding": padding_of(recipe, prepared)}))


def _inspect(options: argparse.Namespace) -> None:
    from llava_train.inspection import Choice, choose, coloured, inspect
    from llava_train.inspection_page import write_page
    from llava_train.recipe import load_recipe
    from llava_train.training.material import sources_of

    recipe = load_recipe(options.recipe, options.overrides)
    if options.jsonl:
        for record in inspect(recipe, options.n):
            print(json.dumps(record))
        return
    sources = sources_of(recipe)
    count = 5 if options.n is None and options.id is None else options.n
    rows = choose(recipe, sources, Choice(count, options.id, options.source, options.longest, options.random))
    tokenizer, image_id = sources[0].encoder.tokenizer, sources[0].encoder.image_token_id
    if options.html:
        shown = write_page(Path(options.html), f"{options.recipe}: what is trained on", rows, tokenizer, image_id)
        print(f"{options.html}: {shown} records", file=sys.stderr)
        return
    for row in rows:
        print(coloured(row, tokenizer, image_id), end="\n\n")


def _train(options: argparse.Namespace) -> None:
    from llava_train.recipe import load_recipe
    from llava_train.training.monitor import say
    from llava_train.training.run import train

    folder = train(load_recipe(options.recipe, options.overrides), fresh=options.fresh)
    say(f"done: {folder}; next: llava-train chat {folder} --image PICTURE, or llava-train export {folder} OUT")
    if int(os.environ.get("RANK", "0")) == 0:
        print(folder)


def _evaluate(options: argparse.Namespace) -> None:
    from llava_train.evaluation.run import evaluate

    result = evaluate(
        _load_placed(options),
        options.data,
        options.image_root,
        shuffle_images=options.shuffle_images,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
    )
    if options.out:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
        Path(options.out).write_text(lines, encoding="utf-8")
    print(json.dumps(result.figures))


def _export(options: argparse.Namespace) -> None:
    from llava_train.exporters.run import export

    print(export(options.model, options.out, options.to, options.dtype, options.overwrite))


def _chat(options: argparse.Namespace) -> None:
    from llava_train.chat.session import Chat
    from llava_train.chat.terminal import converse, one_shot

    chat = Chat(_load_placed(options), options.max_new_tokens, options.temperature)
    for image in options.image:
        chat.show(image)
    if options.prompt is None:
        converse(chat)
    else:
        one_shot(chat, options.prompt)


if __name__ == "__main__":
    sys.exit(main())
