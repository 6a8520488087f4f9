"""The arguments of the command line: what each command takes, and the help that teaches it."""

from __future__ import annotations

import argparse

from llava_train import __version__

_RECIPE_HELP = "a YAML file, e.g. configs/demo/stage1.yaml"
_OVERRIDE_HELP = "change a key of the recipe, e.g. optimization.learning_rate=2e-4 output=runs/mine"
EXPORT_TARGETS = {
    "hf": "transformers' own classes: transformers, vLLM, LMDeploy",
    "llava": "the original LLaVA layout, whole: the original code, SGLang",
    "llava-stage1": "the original layout of a connector alone (mm_projector.bin)",
    "llava-lora": "the original layout of adapters and what else was trained",
    "gguf": "model.gguf, mmproj.gguf and a Modelfile: llama.cpp, Ollama",
    "remote-code": "one modelling file beside the weights, for what transformers has no class for",
    "adapter": "a PEFT folder over a model in transformers' layout",
}
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
    for add in (
        _add_demo,
        _add_prepare,
        _add_inspect,
        _add_train,
        _add_replay,
        _add_evaluate,
        _add_export,
        _add_chat,
        _add_serve,
        _add_web,
    ):
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
        description="Writes the folder under a temporary name, loads it in a fresh process by its reader's loader,\n"
        "compares logits, prompts and greedy answers with the model, and only then gives it its name. Beside the\n"
        "weights lie export_report.json (the proof) and README.md (a model card); see docs/backends.md.\n\n"
        "targets:\n" + "".join(f"  {name:13}{summary}\n" for name, summary in EXPORT_TARGETS.items()),
    )
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--to", default="hf", metavar="TARGET", help="one of the targets above (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)")
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="the language model's linear layers in 8 or 4 bits (hf, gguf)"
    )
    parser.add_argument(
        "--held-out", metavar="FILE", help="records to measure --quantize on (default: what the run held out)"
    )
    parser.add_argument("--image-root", help="folder that their image paths start from (default: that of --held-out)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    return parser


def _add_chat(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "chat",
        help="talk with a model about pictures",
        description="A conversation in the terminal; answers stream. /image PATH-or-URL adds a picture, /regenerate\n"
        "answers again, /save and /load FILE.json keep the conversation, /quit ends; any other /word shows them all.\n"
        "With --prompt: one answer, then the end.",
    )
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("--image", action="append", default=[], help="path or URL to begin with (can be repeated)")
    parser.add_argument("--prompt", help="ask this once and end")
    parser.add_argument("--max-new-tokens", type=_count, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that reach this probability together")
    parser.add_argument("--seed", type=int, help="draw the same each time")
    _placement_arguments(parser)
    return parser


def _add_serve(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help="answer over HTTP as OpenAI's API does",
        description="Serves /v1/chat/completions (streaming, pictures as data: or http URLs), /v1/models and /health.\n"
        "Answers are greedy unless a request gives a temperature. Requests that wait together are answered together.",
    )
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="what requests must bring (better: set LLAVA_TRAIN_API_KEY)")
    parser.add_argument("--name", help="what requests call the model (default: its folder's name)")
    parser.add_argument("--max-batch", type=_count, default=8, help="answers at a time (default: %(default)s)")
    parser.add_argument(
        "--max-queue", type=_count, default=64, help="requests that may wait; others get 429 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=_count, default=512, help="longest answer unless asked for (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=_count, help="tokens of prompt and answer (default: as the LLM was made)")
    parser.add_argument("--temperature", type=float, default=0.0, help="unless asked for (default: 0, greedy)")
    parser.add_argument("--max-images", type=_count, default=8, help="pictures of a request (default: %(default)s)")
    parser.add_argument("--max-image-mb", type=float, default=10, help="megabytes of a picture (default: %(default)s)")
    parser.add_argument("--no-urls", action="store_true", help="read no pictures from the web, only data: URLs")
    parser.add_argument(
        "--allow-private-urls", action="store_true", help="read pictures from private and loopback addresses too"
    )
    _placement_arguments(parser)
    return parser


def _add_web(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "web",
        help="talk with a model, or compare two, in a browser",
        description="A page with pictures, questions and answers that stream; boxes that an answer names are drawn\n"
        "onto the picture. With a second model both answer the same questions, side by side.",
    )
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("model2", nargs="?", metavar="model", help="a second one, to compare")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=7860, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", help="what visitors must give (better: set LLAVA_TRAIN_WEB_AUTH)"
    )
    parser.add_argument("--max-new-tokens", type=_count, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that reach this probability together")
    _placement_arguments(parser)
    return parser


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return number


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
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: bfloat16 on a GPU"
    )
    parser.add_argument(
        "--attn-implementation",
        choices=("sdpa", "eager", "flash_attention_2"),
        default="sdpa",
        help="attention of the language model (default: %(default)s)",
    )
    bits = parser.add_mutually_exclusive_group()
    for each in ("8bit", "4bit"):
        bits.add_argument(
            f"--load-in-{each}",
            dest="load_in",
            action="store_const",
            const=each,
            help=f"linear layers of the language model in {each[0]} bits (bitsandbytes)",
        )
    parser.add_argument(
        "--device-map",
        choices=("auto", "balanced", "sequential"),
        help="spread the model over all GPUs, and the CPU for what is left",
    )
