"""Shards: whatever ranks wrote them, in whatever cuts, any other ranks find their elements in them."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.errors import CheckpointError
from llava_train.model.tuning import Group
from llava_train.tensorfile import write_tensors
from llava_train.training.checkpoints.manifest import seal
from llava_train.training.checkpoints.shards import MOMENTS, load_shards, shard_entries, shard_name
from llava_train.training.engines.base import Fragment

SIZES = {"a.weight": 13, "a.bias": 1, "layers.0@x.weight": 7}
"""Weights and their elements; a name may hold what keys are made of."""
KINDS = ("weight", *MOMENTS)
PADDING = -7.0


@dataclass
class Holder:
    """What one rank holds."""

    fragments: list[Fragment]
    optimizer: torch.optim.Optimizer


def truth(name: str, kind: str) -> torch.Tensor:
    """The elements of a weight, or of a moment."""
    seed = list(SIZES).index(name) * len(KINDS) + KINDS.index(kind)
    return torch.randn(SIZES[name], generator=torch.Generator().manual_seed(seed))


def flat_or_apart(runs: list[tuple[str, int, int]], flat: bool, gap: int) -> Holder:
    """A rank that holds `runs` (weight, start, count): in one padded buffer, as ZeRO does, or each in a parameter."""
    fragments = []
    if flat:
        buffer = torch.full((gap + sum(count + gap for *_, count in runs),), PADDING)
        offset = gap
        for name, start, count in runs:
            fragments.append(Fragment(name, start, count, buffer, offset))
            offset += count + gap
    else:
        fragments = [
            Fragment(name, start, count, torch.nn.Parameter(torch.full((count, 1), PADDING)))
            for name, start, count in runs
        ]
    owners = list({id(fragment.owner): fragment.owner for fragment in fragments}.values()) or [torch.zeros(1)]
    return Holder(fragments, torch.optim.AdamW(owners))


@st.composite
def worlds(draw: Any) -> list[Holder]:
    """One to four ranks among which every weight is cut at random; some may hold nothing."""
    count = draw(st.integers(1, 4))
    runs: list[list[tuple[str, int, int]]] = [[] for _ in range(count)]
    for name, size in SIZES.items():
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=4))})
        for start, end in pairwise(cuts):
            runs[draw(st.integers(0, count - 1))].append((name, start, end - start))
    return [flat_or_apart(draw(st.permutations(own)), draw(st.booleans()), draw(st.integers(0, 2))) for own in runs]


def fill(world: list[Holder], steps: int) -> None:
    """Give fragments the true values; `steps` 0: no step was made, so there are no moments."""
    for holder in world:
        for fragment in holder.fragments:
            values = holder.optimizer.state[fragment.owner]
            for kind in MOMENTS if steps else ():
                values.setdefault(kind, torch.full_like(fragment.owner, PADDING, requires_grad=False))
                fragment.of(values[kind]).copy_(truth(fragment.name, kind)[fragment.start :][: fragment.count])
            if steps:
                values["step"] = torch.tensor(float(steps))
            fragment.of(fragment.owner).copy_(truth(fragment.name, "weight")[fragment.start :][: fragment.count])


def write(folder: Path, world: list[Holder], copied: bool = False) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    digests = {}
    for rank, holder in enumerate(world):
        name = shard_name(rank, len(world))
        entries = shard_entries(holder.fragments, holder.optimizer, copied)
        if copied:
            with torch.no_grad():
                for fragment in holder.fragments:
                    fragment.owner.zero_()
        if entries:
            digests[name] = write_tensors(folder / name, entries)
    seal(folder, digests)
    return folder


def groups(sizes: dict[str, int] = SIZES) -> list[Group]:
    return [Group("llm", 0.1, 0.0, (name,), size) for name, size in sizes.items()]


def read(folder: Path, world: list[Holder]) -> None:
    for holder in world:
        load_shards(folder, holder.fragments, holder.optimizer, groups())


def held(world: list[Holder]) -> Iterator[tuple[Fragment, str, torch.Tensor]]:
    for holder in world:
        for fragment in holder.fragments:
            yield fragment, "weight", fragment.owner
            for kind in MOMENTS:
                yield fragment, kind, holder.optimizer.state[fragment.owner][kind]


def plain(*cuts: tuple[str, int, int]) -> list[Holder]:
    """One rank that holds every weight whole, or these runs."""
    return [flat_or_apart(list(cuts) or [(name, 0, size) for name, size in SIZES.items()], False, 0)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(before=worlds(), after=worlds(), copied=st.booleans(), steps=st.integers(1, 9))
def test_what_one_world_wrote_another_reads(
    tmp_path_factory: pytest.TempPathFactory, before: list[Holder], after: list[Holder], copied: bool, steps: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    fill(before, steps)
    read(write(folder, before, copied), after)
    for fragment, kind, tensor in held(after):
        assert torch.equal(fragment.of(tensor), truth(fragment.name, kind)[fragment.start :][: fragment.count])
    for holder in after:
        for owner in {id(f.owner): f.owner for f in holder.fragments}.values():
            outside = torch.ones(owner.numel(), dtype=torch.bool)
            for fragment in holder.fragments:
                if fragment.owner is owner:
                    outside[fragment.offset : fragment.offset + fragment.count] = False
            assert (owner.detach().view(-1)[outside] == PADDING).all()
            assert float(holder.optimizer.state[owner]["step"]) == steps


def test_a_checkpoint_before_the_first_step_has_weights_alone(tmp_path: Path) -> None:
    before, after = plain(), plain()
    fill(before, steps=0)
    read(write(tmp_path / "a", before), after)
    for fragment in after[0].fragments:
        assert torch.equal(fragment.of(fragment.owner), truth(fragment.name, "weight"))
    assert not any(after[0].optimizer.state.values())


def test_missing_elements_are_told(tmp_path: Path) -> None:
    cuts = [("a.weight", 0, 4), ("a.weight", 6, 7), ("a.bias", 0, 1), ("layers.0@x.weight", 0, 7)]
    before = plain(*cuts)
    fill(before, steps=2)
    write(tmp_path / "a", before)
    sizes = {**SIZES, "a.weight": 11}
    holder = plain()[0]
    with pytest.raises(CheckpointError, match=r"a: element 4 of a\.weight is missing"):
        load_shards(tmp_path / "a", holder.fragments, holder.optimizer, groups(sizes))
    with pytest.raises(CheckpointError, match="holds 19 trained elements, 21 train now: shapes changed"):
        read(tmp_path / "a", plain())


def test_a_piece_that_is_there_twice_hides_none_that_is_missing(tmp_path: Path) -> None:
    cuts = [("a.weight", 0, 6), ("a.weight", 1, 6), ("a.weight", 12, 1), ("a.bias", 0, 1), ("layers.0@x.weight", 0, 7)]
    before = plain(*cuts)
    fill(before, steps=2)
    write(tmp_path / "a", before)
    with pytest.raises(CheckpointError, match=r"element 7 of a\.weight is missing"):
        read(tmp_path / "a", plain())


def test_a_missing_moment_is_told(tmp_path: Path) -> None:
    before = plain()
    fill(before, steps=2)
    del before[0].optimizer.state[before[0].fragments[0].owner]["exp_avg_sq"]
    write(tmp_path / "a", before)
    with pytest.raises(CheckpointError, match=r"element 0 of a\.weight is missing"):
        read(tmp_path / "a", plain())


def test_other_weights_are_named(tmp_path: Path) -> None:
    before = plain()
    fill(before, steps=2)
    before[0].fragments[1] = replace(before[0].fragments[1], name="b.bias")
    write(tmp_path / "a", before)
    with pytest.raises(CheckpointError, match=r"a: other weights train now: a\.bias, b\.bias$"):
        read(tmp_path / "a", plain())


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "no shard", "gone", "manifest"])
def test_a_damaged_shard_is_a_checkpoint_error(tmp_path: Path, damage: str) -> None:
    before = plain()
    fill(before, steps=2)
    path = write(tmp_path / "a", before) / shard_name(0, 1)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "manifest":
        (tmp_path / "a" / "manifest.json").write_text("{}")
    elif damage == "no shard":
        write_tensors(path, shard_entries([], before[0].optimizer, False))
    else:
        path.write_bytes({"cut": content[:-1], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=str(tmp_path / "a")):
        read(tmp_path / "a", plain())


def test_files_that_the_manifest_does_not_name_are_not_read(tmp_path: Path) -> None:
    before, stray, after = plain(), plain(), plain()
    fill(before, steps=2)
    write(tmp_path / "a", before)
    entries = shard_entries(stray[0].fragments, stray[0].optimizer, False)
    write_tensors(tmp_path / "a" / shard_name(1, 2), entries)
    read(tmp_path / "a", after)
    for fragment, kind, tensor in held(after):
        assert torch.equal(fragment.of(tensor), truth(fragment.name, kind))
