#!/usr/bin/env python3
"""Train over two nodes on one Linux machine and compare the curve with one process: the launchers' real paths.

A node is a network namespace with a host name and an address of its own, one rank each, on the CPU. The nodes reach
one another by name over a virtual cable, as machines of a cluster do, and share the disk.

    python scripts/two_nodes.py RECIPE [key=value ...] [--launchers torchrun deepspeed accelerate]

Namespaces and processes live in a process namespace that ends with this command, however it ends. The last line of
stdout is one JSON: what ran and how far its metrics are from those of one process. Exit status: 0 the curves agree,
1 they do not, or a run failed or took too long, 2 the arguments are wrong, 77 the system allows no namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = str(REPOSITORY / "scripts" / "train.py")
NOT_ALLOWED = 77
TOLERANCE = 1e-5
NODES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
FIRST = next(iter(NODES))
PORT = "29500"
# What makes curves comparable (dropout draws per rank) and runs short; the caller's overrides come later and win.
SHORT = ["engine.device=cpu", "optimization.precision=fp32", "tune.lora.dropout=0", "optimization.max_steps=3"]
SHORT += ["checkpoint.save_every=0", "monitor.eval_every=0"]
ZERO = ["engine.kind=deepspeed_zero2"]


class RunError(Exception):
    """A run ended badly; the message holds the end of what it said."""


class NamespaceError(Exception):
    """The system gives no namespaces; the message is its own."""


def torchrun(node: int, folder: Path) -> list[str]:
    """torchrun's own rendezvous: the first node holds it, every node starts the same command."""
    where = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{FIRST}:{PORT}", "--rdzv_id", "two_nodes"]
    return ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *where, TRAIN]


def deepspeed(node: int, folder: Path) -> list[str]:
    """A hostfile; without ssh each node is started by hand and told its number."""
    hosts = folder / "hostfile"
    hosts.write_text("".join(f"{name} slots=1\n" for name in NODES), encoding="utf-8")
    where = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node), "--master_addr", FIRST]
    return ["deepspeed.launcher.runner", *where, "--master_port", PORT, TRAIN]


def accelerate(node: int, folder: Path) -> list[str]:
    """`--multi_gpu` is what makes Accelerate start several processes, on CPUs too."""
    where = ["--num_machines", "2", "--machine_rank", str(node), "--main_process_ip", FIRST]
    where += ["--main_process_port", PORT]
    return ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *where, TRAIN]


LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed, "accelerate": accelerate}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this file again inside namespaces and hand its result on; the exit status."""
    options = parse(arguments)
    if options.inside:
        return inside(options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        allowed()
        with tempfile.TemporaryDirectory() as folder:
            again = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), "--inside", folder]
            # However the wait ends, `unshare` is killed, and what runs inside ends with it. Ctrl-C is for us alone.
            limit = options.time_limit
            try:
                done = subprocess.run([*isolated(), *again], check=False, timeout=limit, start_new_session=True)
            except subprocess.TimeoutExpired:
                said = "".join(f"\n{log.name}:\n{end_of(log)}" for log in sorted(Path(folder).glob("*.log")))
                print(f"two_nodes: not done after {limit:g} s; see --time-limit{said}", file=sys.stderr)
                return 1
            return done.returncode
    except NamespaceError as error:
        print(f"two_nodes: this system allows no namespaces: {error}", file=sys.stderr)
        return NOT_ALLOWED
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; with `inside`, a folder to work in, the command calls itself."""
    intro, rest = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=intro, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe that one process can train on a CPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"on top of: {' '.join(SHORT)}")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=["torchrun", "deepspeed"])
    parser.add_argument("--time-limit", type=float, default=300, metavar="SECONDS", help="for all of it (300)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def isolated() -> list[str]:
    """Namespaces of network, mounts and processes for the command that follows; no root needed where users may."""
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *users, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def allowed() -> None:
    """Raise NamespaceError where namespaces, mounts or the tools for them are missing."""
    trial = "mount -t tmpfs none /run && ip netns add trial && ip link add eth0 netns trial type veth peer name eth1"
    try:
        done = subprocess.run([*isolated(), "sh", "-c", trial], capture_output=True, text=True, check=False, timeout=30)
    except OSError as error:
        raise NamespaceError(f"{error.filename}: {error.strerror} (Debian: util-linux and iproute2)") from error
    if done.returncode:
        raise NamespaceError(" ".join(done.stderr.split()) or f"unshare ended with {done.returncode}")


def inside(options: argparse.Namespace) -> int:
    """The comparison itself, in namespaces of its own."""
    folder = options.inside
    make_nodes(folder)
    common = [options.recipe, *SHORT, f"data.cache_dir={folder / 'prepared'}", *options.overrides]
    try:
        run(folder, [[sys.executable, TRAIN, *common, f"output={folder / 'alone'}"]])
        runs = [compared(launcher, common, folder) for launcher in options.launchers]
    except RunError as error:
        print(f"two_nodes: {error}", file=sys.stderr)
        return 1
    worst = max(row["max_relative_difference"] for row in runs)
    agree = worst <= TOLERANCE
    print(json.dumps({"recipe": options.recipe, "agree": agree, "max_relative_difference": worst, "runs": runs}))
    return 0 if agree else 1


def compared(launcher: str, common: list[str], folder: Path) -> dict[str, Any]:
    """One launcher's run over both nodes, beside the run of one process."""
    started = time.perf_counter()
    zero = ZERO if launcher == "deepspeed" else []
    commands = [
        [sys.executable, "-m", *LAUNCHERS[launcher](node, folder), *common, *zero, f"output={folder / launcher}"]
        for node in range(len(NODES))
    ]
    run(folder, [on_node(name, folder, command) for name, command in zip(NODES, commands)])
    two = metrics(folder / launcher)
    return {
        "launcher": launcher,
        "command": " ".join(commands[0][1:]),
        "steps": sum("loss" in row for row in two),
        "max_relative_difference": difference(metrics(folder / "alone"), two),
        "seconds": round(time.perf_counter() - started, 1),
    }


def make_nodes(folder: Path) -> None:
    """Two network namespaces, joined by a virtual cable, and the names by which they find one another."""
    hosts = "".join(f"{address} {name}\n" for name, address in NODES.items())
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts, encoding="utf-8")
    a, b = NODES
    steps = ["mount -t tmpfs none /run", f"ip netns add {a}", f"ip netns add {b}"]
    steps.append(f"ip link add eth0 netns {a} type veth peer name eth0 netns {b}")
    for name, address in NODES.items():
        steps += [f"ip -n {name} address add {address}/24 dev eth0"]
        steps += [f"ip -n {name} link set {device} up" for device in ("eth0", "lo")]
    for step in steps:
        subprocess.run(step.split(), check=True)


def on_node(name: str, folder: Path, command: list[str]) -> list[str]:
    """The command as started on a node: its network, its host name, its /etc/hosts."""
    setup = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", setup, name, str(folder / "hosts"), *command]


def run(folder: Path, commands: list[list[str]]) -> None:
    """Start all, wait for all; logs lie in `folder`. Raises RunError as soon as one fails: its peer would wait."""
    # Each node is a machine of its own to its launcher; here they share the cores.
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    logs = [folder / f"process-{index}.log" for index in range(len(commands))]
    with ExitStack() as stack:
        streams = [stack.enter_context(log.open("w")) for log in logs]
        started = [
            subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
            for command, stream in zip(commands, streams)
        ]
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.05)
    for code, log in zip(codes, logs):
        if code:
            raise RunError(f"{log.stem} of {len(codes)} ended with {code}:\n{end_of(log)}")


def end_of(log: Path) -> str:
    """What was said last, for a person to read."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()[-40:])


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "stall")} for row in rows]


def difference(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    """The largest relative difference of any figure. Raises RunError where rows or keys differ."""
    if [row.keys() for row in one] != [row.keys() for row in two]:
        raise RunError(f"{len(one)} rows of one process, {len(two)} of two, or other keys")
    pairs = [(a[key], b[key]) for a, b in zip(one, two) for key in a]
    return max(abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0 for x, y in pairs)


if __name__ == "__main__":
    sys.exit(main())
