"""The arguments of the command line: what each command takes, and the help that teaches it."""

from __future__ import annotations

import argparse

from llava_train import __version__

_RECIPE_HELP = "a YAML file, e.g. configs/demo/stage1.yaml"
_OVERRIDE_HELP = "change a key of the recipe, e.g. optimization.learning_rate=2e-4 output=runs/mine"
_MODEL_HELP = "a run folder, an exported folder, or a published model that docs/models.md names (folder or hub id)"


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="llava-train",
        description="Train, fine-tune and export LLaVA-style vision-language models.",
        epilog="Start with `llava-train demo`: the whole recipe on a CPU in minutes.",
    )
    parser.add_argument("--version", action="version", version=f"llava-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_prepare, _add_inspect, _add_train, _add_replay, _add_evaluate, _add_export, _add_chat):
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
    return parser


def _add_inspect(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "inspect",
        help="show what of each record is supervised",
        description="Shows the training records as the model sees them: supervised text green, the rest dim,\n"
        "pictures as one block. With --jsonl: one JSON a record (id, input_ids, labels, image_token_id, image_tokens).",
    )
    _recipe_arguments(parser)
    parser.add_argument("--n", type=_count, help="only N records (default: 5, with --jsonl all)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--id", help="the records of this id")
    which.add_argument("--longest", action="store_true", help="the longest records (prepares the set if it is missing)")
    which.add_argument("--random", action="store_true", help="records by chance (prepares the set if it is missing)")
    parser.add_argument("--source", help="only records of the source of this name (its path, unless it has a name)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--html", metavar="FILE", help="write a page with pictures, to open in a browser")
    form.add_argument("--jsonl", action="store_true", help="machine-readable, labels unshifted, -100 unsupervised")
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
    _allow_change_argument(parser)
    return parser


def _add_replay(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "replay",
        help="look again at a step whose loss or gradient was not finite",
        description="Makes the steps from the newest checkpoint before that step again, as the run made them, and\n"
        "looks at each sample of the step by itself. Works in one process, on a CPU too, whatever the run was\n"
        "made with, and only reads the run folder.\n\n"
        "Prints one JSON a sample, those that are not finite first: sample (id and place), finite, loss (of a\n"
        "supervised token), grad_norm, tokens, supervised_tokens. On stderr: which samples they are, the first\n"
        "module whose output is not finite and what went into it (or the first backward operation), then the\n"
        "learning rates and the largest weights.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of the run (key `output` of its recipe)")
    parser.add_argument(
        "--step", type=_count, help="the step, from 1 (default: the one that failed last, see RUN/failed)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: as the run, a GPU if there is one"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="another than the run's: does it happen in fp32 too?"
    )
    _allow_change_argument(parser)
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
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=_RECIPE_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDE_HELP)


def _allow_change_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although this key (as the refusal names it) has changed; can be given several times",
    )


def _placement_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: bfloat16 on a GPU"
    )
