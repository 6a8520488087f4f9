"""The command line: `llava-train COMMAND ...`.

Progress and logs go to stderr, results to stdout. Exit status: 0 done, 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llava_train.arguments import build_parser
from llava_train.errors import LlavaTrainError

if TYPE_CHECKING:
    from llava_train.model.assemble import Assembly


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
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # ends as Ctrl-C does: nothing is left half done
    try:
        COMMANDS[options.command](options)
        return 0
    except LlavaTrainError as error:
        if options.debug:
            raise
        print(f"llava-train {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        again = _GOES_ON.get(options.command, "")
        print(f"\nllava-train {options.command}: stopped{again}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if options.debug:
            raise
        print(f"llava-train {options.command}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def _load_placed(options: argparse.Namespace) -> Assembly:
    """The model where and how it was asked for."""
    from llava_train.model.placement import Placement, load_placed

    asked = (options.device, options.dtype, options.attn_implementation, options.load_in, options.device_map)
    return load_placed(options.model, Placement(*asked))


def _demo(options: argparse.Namespace) -> None:
    from llava_train.demo.run import run_demo

    run_demo(options.out, quick=options.quick)


def _prepare(options: argparse.Namespace) -> None:
    from llava_train.data.preparing.composition import composition_table, epoch_line
    from llava_train.recipe import load_recipe
    from llava_train.training.material import epoch_of, padding_of, prepare

    recipe = load_recipe(options.recipe, options.overrides)
    prepared = prepare(recipe, rebuild=options.rebuild)
    info = prepared.train.info
    print(composition_table(info), file=sys.stderr)
    print(epoch_line(epoch_of(prepared)), file=sys.stderr)
    if prepared.validation is not None and prepared.validation is not prepared.train:
        print(f"held out\n{composition_table(prepared.validation.info)}", file=sys.stderr)
    hidden = ("dropped", "inputs", "image_token_id", "sources", "fingerprint")
    result = {"folder": str(prepared.train.folder), "fingerprint": info["fingerprint"]}
    result |= {key: value for key, value in info.items() if key not in hidden}
    result["sources"] = [{k: v for k, v in source.items() if k != "pieces"} for source in info["sources"]]
    result |= {"epoch": prepared.mixture.size, "epoch_by_source": epoch_of(prepared)}
    result["held_out"] = len(prepared.validation_rows)
    print(json.dumps({**result, "padding": padding_of(recipe, prepared)}))


def _inspect(options: argparse.Namespace) -> None:
    from llava_train.inspection import Choice, choose, coloured, inspect
    from llava_train.inspection_page import write_page
    from llava_train.recipe import load_recipe
    from llava_train.training.material import sources_of

    recipe = load_recipe(options.recipe, options.overrides)
    if options.jsonl:
        choice = Choice(options.n, options.id, options.source, options.longest, options.random)
        for record in inspect(recipe, choice=choice):
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
        print(coloured(row, tokenizer, image_id, _in_colour()), end="\n\n")


def _in_colour() -> bool:
    """Colour for a terminal, unless NO_COLOR asks for none; FORCE_COLOR asks for it anywhere (`| less -R`)."""
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def _train(options: argparse.Namespace) -> None:
    from llava_train.recipe import load_recipe
    from llava_train.training.engines.ranks import leave_ranks
    from llava_train.training.monitor import say
    from llava_train.training.run import train

    folder = train(load_recipe(options.recipe, options.overrides), options.fresh, options.allow_change)
    leave_ranks()
    say(f"done: {folder}; next: llava-train chat {folder} --image PICTURE, or llava-train export {folder} OUT")
    if int(os.environ.get("RANK", "0")) == 0:
        print(folder)


def _replay(options: argparse.Namespace) -> None:
    from llava_train.training.replay import replay

    device = None if options.device == "auto" else options.device
    found = replay(Path(options.run), options.step, device, options.precision, options.allow_change)
    for look in found.looks:
        print(json.dumps(look.row(), ensure_ascii=False))
    print(found.summary, file=sys.stderr)


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
    from llava_train.exporters.run import export, said

    measured = (options.quantize, options.held_out, options.image_root)
    folder = export(options.model, options.out, options.to, options.dtype, options.overwrite, *measured)
    print(said(folder), file=sys.stderr)
    print(folder)


def _chat(options: argparse.Namespace) -> None:
    from llava_train.chat.session import Conversation
    from llava_train.chat.terminal import converse, one_shot

    sampling = (options.max_new_tokens, options.temperature, options.top_p, options.seed)
    conversation = Conversation(_load_placed(options), *sampling)
    if options.prompt is None:
        converse(conversation, options.image)
        return
    for image in options.image:
        conversation.show(image)
    one_shot(conversation, options.prompt)


def _serve(options: argparse.Namespace) -> None:
    from llava_train.serving.run import open_port, serve

    port = open_port(options)
    serve(_load_placed(options), options, port)


def _web(options: argparse.Namespace) -> None:
    from llava_train.web.run import names_of, open_port, serve

    given = [options.model] if options.model2 is None else [options.model, options.model2]
    with open_port(options) as port:
        assemblies = [_load_placed(argparse.Namespace(**{**vars(options), "model": each})) for each in given]
        serve(list(zip(names_of(given), assemblies)), options, port)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "prepare": _prepare,
    "inspect": _inspect,
    "train": _train,
    "replay": _replay,
    "evaluate": _evaluate,
    "export": _export,
    "chat": _chat,
    "serve": _serve,
    "web": _web,
}


if __name__ == "__main__":
    sys.exit(main())
