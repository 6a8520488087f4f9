"""Classes and functions of a package as one source file that needs nothing of it.

`bundle` takes the definitions that it is given, and whatever of the package they name, from the sources as they stand:
only imports are written anew. What comes from elsewhere (torch, transformers, the standard library) stays an import.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import symtable
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache

from llava_train.errors import ExportError

Place = tuple[str, str]
"""A definition: its module, and its name there"""


@dataclass
class _Module:
    """What a module's own statements define and import.

    Attributes:
        lines: of its source.
        docstring: its text, without which the names of shapes would say nothing.
        defined: name -> its statements: one, and for a variable the text below it, too.
        imported: name -> (module, name there); an empty name for the module itself.
    """

    lines: list[str]
    docstring: str
    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, Place] = field(default_factory=dict)


def bundle(entries: Iterable[Place], instead: Mapping[Place, Place] | None = None, without: Iterable[str] = ()) -> str:
    """The source of `entries` and of all that they name in their package, in an order that runs; no docstring.

    Args:
        entries: what is wanted. What else of their top-level packages they need is taken in, too.
        instead: definitions that others stand in for.
        without: methods left out, as patterns of `Class.method`.

    Raises:
        ExportError: two definitions of one name, a name without a definition, an import of the package in a function.
    """
    wanted = list(entries)
    packages = {_package(module) for module, _ in wanted}
    texts: dict[Place, str] = {}
    needs: dict[str, list[str]] = {}  # module -> those that it takes definitions from
    imports: dict[str, Place] = {}
    while wanted:
        place = wanted.pop()
        if place in texts:
            continue
        module, name = place
        texts[place] = _text(module, name, tuple(without), packages)
        needs.setdefault(module, [])
        for used in sorted(_free(texts[place]) - {name}):
            source = _source(module, used, packages)
            source = (instead or {}).get(source, source) if source else None
            if source is None:
                continue
            if _package(source[0]) in packages:
                wanted.append(source)
                needs[module].append(source[0])
            else:
                _bind(imports, used, source)
    _require_one_of_each(texts, imports)
    sections = [_imports(imports), *(_section(module, texts) for module in _in_order(needs))]
    text = "\n\n\n".join(sections) + "\n"
    if loose := unbound(text):
        raise ExportError(f"the modelling file would lack {', '.join(sorted(loose))}")
    return text


def unbound(text: str) -> set[str]:
    """Names that a module's source uses and neither binds nor finds among Python's own."""
    table = symtable.symtable(text, "<bundle>", "exec")
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    return _free(text) - bound - set(dir(builtins))


def _free(text: str) -> set[str]:
    """Names that a piece of source takes from its module."""

    def used(table: symtable.SymbolTable, top: bool) -> Iterator[str]:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (top or symbol.is_global()):
                yield symbol.get_name()
        for child in table.get_children():
            yield from used(child, top=False)

    # Without this line annotations are looked at, too: whoever reads the file wants to know their names.
    return set(used(symtable.symtable(text.replace(_FUTURE, ""), "<bundle>", "exec"), top=True))


_FUTURE = "from __future__ import annotations\n"


@cache
def _module(name: str) -> _Module:
    try:
        source = inspect.getsource(importlib.import_module(name))
    except (OSError, TypeError, ImportError) as error:
        raise ExportError(
            f"{name}: its source cannot be read ({error}): a modelling file is made of sources"
        ) from error
    tree = ast.parse(source)
    found = _Module(source.splitlines(), ast.get_docstring(tree) or "")
    variable = ""
    for statement in tree.body:
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if variable and text:
            found.defined[variable].append(statement)
        variable = ""
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.defined[statement.name] = [statement]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            if isinstance(target, ast.Name):
                variable = target.id
                found.defined[variable] = [statement]
        elif isinstance(statement, ast.ImportFrom):
            found.imported |= {
                each.asname or each.name: (statement.module or "", each.name) for each in statement.names
            }
        elif isinstance(statement, ast.Import):
            found.imported |= {each.asname or each.name: (each.name, "") for each in statement.names}
    return found


def _source(module: str, name: str, packages: set[str]) -> Place | None:
    """Where a name of a module comes from; None for one of Python's own. ExportError if it comes from nowhere."""
    known = _module(module)
    if name in known.defined:
        return module, name
    if name not in known.imported:
        if hasattr(builtins, name):
            return None
        raise ExportError(f"{module}: {name} is no definition that a modelling file can be made of")
    source, there = known.imported[name]
    if _package(source) not in packages:
        return source, there
    if not there or there not in {**_module(source).defined, **_module(source).imported}:
        raise ExportError(f"{module}: {name} is a module, of which a modelling file cannot be made")
    return _source(source, there, packages)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _text(module: str, name: str, without: tuple[str, ...], packages: set[str]) -> str:
    """The lines of a definition with the comments above it."""
    known = _module(module)
    statements = known.defined[name]
    first, last = _first_line(statements[0]), statements[-1].end_lineno or 0
    while first > 1 and known.lines[first - 2].startswith("#"):
        first -= 1
    dropped: set[int] = set()
    for inner in getattr(statements[0], "body", ()):
        method = f"{name}.{inner.name}" if isinstance(inner, ast.FunctionDef) else ""
        if any(fnmatchcase(method, pattern) for pattern in without):
            dropped |= {*range(_first_line(inner) - 1, (inner.end_lineno or 0) + 1)}  # with the empty line before it
    for inner in ast.walk(statements[0]):
        if isinstance(inner, ast.ImportFrom) and _package(inner.module or "") in packages:
            raise ExportError(f"{module}: {name} imports {inner.module} where it runs: a modelling file has no such")
    return "\n".join(known.lines[line - 1] for line in range(first, last + 1) if line not in dropped)


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", ())
    return min([statement.lineno, *(each.lineno for each in decorators)])


def _bind(imports: dict[str, Place], name: str, source: Place) -> None:
    if imports.setdefault(name, source) != source:
        raise ExportError(f"{name} is imported from {source[0]} and from {imports[name][0]}: rename one of them")


def _require_one_of_each(texts: Mapping[Place, str], imports: Mapping[str, Place]) -> None:
    owners: dict[str, str] = {name: source for name, (source, _) in imports.items()}
    for module, name in texts:
        if name in owners:
            raise ExportError(f"{name} is defined in {module} and in {owners[name]}: rename one of them")
        owners[name] = module


def _imports(imports: Mapping[str, Place]) -> str:
    """Plain imports, then those of names: a line a module."""
    plain = {
        f"import {source}" + (f" as {name}" if name != source else "")
        for name, (source, there) in imports.items()
        if not there
    }
    by_module: dict[str, list[str]] = {}
    for name, (source, there) in imports.items():
        if there:
            by_module.setdefault(source, []).append(there if there == name else f"{there} as {name}")
    lines = [f"from {source} import {', '.join(sorted(names))}" for source, names in sorted(by_module.items())]
    return "\n".join([_FUTURE, *sorted(plain), *lines])


def _in_order(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules after those that they take from."""
    order: dict[str, None] = {}

    def visit(module: str, above: frozenset[str]) -> None:
        for other in sorted(set(needs[module]) - above):
            if other != module:
                visit(other, above | {module})
        order[module] = None

    for module in sorted(needs):
        visit(module, frozenset({module}))
    return list(order)


def _section(module: str, texts: Mapping[Place, str]) -> str:
    known = _module(module)
    names = [name for name in known.defined if (module, name) in texts]
    title = [f"From {module}", *known.docstring.splitlines()]
    heading = "\n".join(f"# {line}".rstrip() for line in title)
    return "\n\n\n".join([heading, *(texts[module, name] for name in names)])
