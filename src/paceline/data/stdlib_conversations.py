"""Conversations made from the Python standard library of this machine: text that everyone has, nothing to download.

Sources are parsed with `ast` and never imported. Modules are split into three disjoint groups by a hash of their
top-level name, so that a question about a held-out module was never part of any training, on any Python version.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

Group = Literal["target", "draft", "held_out"]
Function = ast.FunctionDef | ast.AsyncFunctionDef

_SKIPPED_PARTS = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings"}
)
_PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_strptime": "datetime",
    "_threading_local": "threading.local",
    "ntpath": "os.ntpath",
    "posixpath": "os.path",
    "genericpath": "os.genericpath",
    "nturl2path": "urllib.nturl2path",
    "sre_compile": "re.sre_compile",
    "sre_constants": "re.sre_constants",
    "sre_parse": "re.sre_parse",
}
"""Modules that implement another one, and which: they must be in its group."""
_SHARES: tuple[tuple[Group, int], ...] = (("target", 64), ("draft", 84), ("held_out", 100))
_MAX_ANSWER_CHARS = 260
_MAX_SOURCE_BYTES = 400_000
_MAX_NAMES = 6


@dataclasses.dataclass(frozen=True)
class Definition:
    """A module, class or function of the standard library, as its source says it."""

    module: str
    """Dotted name of the module."""
    name: str
    """Name inside the module ("JSONEncoder.encode"); empty for the module itself."""
    kind: Literal["module", "class", "function", "method"]
    documentation: str
    """First sentences of the docstring, cleaned; may be empty."""
    signature: str = ""
    """"dumps(obj, *, skipkeys=False)"; functions and methods only."""
    parameters: tuple[str, ...] = ()
    """Names, without `self` and `cls`."""
    members: tuple[str, ...] = ()
    """Public functions of a module or methods of a class, in the order of the source."""
    first_lines: str = ""
    """`def` and the first statements, without the docstring; functions and methods only."""

    @property
    def full_name(self) -> str:
        """Name with its module, as one would ask for it."""
        return f"{self.module}.{self.name}" if self.name else self.module


def group_of(module: str) -> Group:
    """Which group a module belongs to; depends on its top-level name alone (`_bootlocale` counts as `bootlocale`)."""
    top_level = module.partition(".")[0].lstrip("_")
    percent = _hash(f"paceline 4 {top_level}") % 100
    return next(group for group, end in _SHARES if percent < end)


def read_sources(group: Group, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(dotted module name, source text) of a group's modules, sorted by path; unreadable files are left out.

    `root` is the directory of a standard library; None is this interpreter's.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_PARTS & set(parts) or any("-" in part or part.startswith("_sysconfigdata") for part in parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        module = _PUBLIC_NAMES.get(module, module)
        if not module or group_of(module) != group:
            continue
        try:
            if path.stat().st_size <= _MAX_SOURCE_BYTES:
                yield module, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a distribution may ship broken links, and old modules in other encodings


def read_definitions(group: Group, root: Path | None = None) -> Iterator[Definition]:
    """Modules, public classes and functions of a group, in the order of their sources."""
    for module, source in read_sources(group, root):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources are not our concern
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        yield from _definitions(module, tree)


def make_conversations(group: Group, limit: int | None = None, root: Path | None = None) -> list[dict[str, Any]]:
    """Conversations of a group: {"messages": [{"role", "content"}, ...], "module": top-level name}.

    In a fixed order in which the modules take turns, so that the first `limit` are from as many as possible.
    One in eight continues with a second question about the same thing.
    """
    found: dict[str, dict[str, Any]] = {}
    for definition in read_definitions(group, root):
        turns = [turn for form in _FORMS if (turn := form(definition)) is not None]
        for i, (question, answer) in enumerate(turns):
            messages = _turn(question, answer)
            if len(turns) > 1 and _hash(question) % 8 == 0:
                follow_up, second_answer = turns[(i + 1) % len(turns)]
                messages += _turn(follow_up, second_answer)
            found.setdefault(question, {"messages": messages, "module": definition.module.partition(".")[0]})
    num_before: Counter[str] = Counter()
    order = []
    for question in sorted(found, key=_hash):
        module = found[question]["module"]
        order.append((num_before[module], _hash(question), question))
        num_before[module] += 1
    return [found[question] for _, _, question in sorted(order)[:limit]]


def write_conversations(path: Path, group: Group, limit: int | None = None, root: Path | None = None) -> int:
    """Write `make_conversations` as JSONL, replacing `path` at once; returns how many there are."""
    conversations = make_conversations(group, limit, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("".join(json.dumps(one) + "\n" for one in conversations), encoding="utf-8")
    unfinished.replace(path)
    return len(conversations)


# ---------------------------------------------------------------- from source to definitions


def _definitions(module: str, tree: ast.Module) -> Iterator[Definition]:
    functions = tuple(node.name for node in tree.body if isinstance(node, Function) and _is_public(node.name))
    yield Definition(module, "", "module", clean_docstring(ast.get_docstring(tree)), members=functions)
    for node in tree.body:
        if isinstance(node, Function) and _is_public(node.name):
            yield _function(module, node.name, "function", node)
        elif isinstance(node, ast.ClassDef) and _is_public(node.name):
            methods = [child for child in node.body if isinstance(child, Function) and _is_public(child.name)]
            documentation = clean_docstring(ast.get_docstring(node))
            names = tuple(dict.fromkeys(method.name for method in methods))
            yield Definition(module, node.name, "class", documentation, members=names)
            for method in methods:
                yield _function(module, f"{node.name}.{method.name}", "method", method)


def _function(module: str, name: str, kind: Literal["function", "method"], node: Function) -> Definition:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters = tuple(argument.arg for argument in named if argument.arg not in {"self", "cls"})
    return Definition(
        module,
        name,
        kind,
        clean_docstring(ast.get_docstring(node)),
        signature=f"{node.name}({ast.unparse(_without_annotations(arguments))})",
        parameters=parameters,
        first_lines=_first_lines(node),
    )


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
    def bare(argument: ast.arg) -> ast.arg:
        return ast.arg(argument.arg)

    return ast.arguments(
        posonlyargs=[bare(a) for a in arguments.posonlyargs],
        args=[bare(a) for a in arguments.args],
        vararg=bare(arguments.vararg) if arguments.vararg else None,
        kwonlyargs=[bare(a) for a in arguments.kwonlyargs],
        kw_defaults=arguments.kw_defaults,
        kwarg=bare(arguments.kwarg) if arguments.kwarg else None,
        defaults=arguments.defaults,
    )


def _first_lines(node: Function, max_lines: int = 5) -> str:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = [f"def {node.name}({ast.unparse(_without_annotations(node.args))}):"]
    for statement in body:
        lines += ["    " + line for line in ast.unparse(statement).splitlines()]
        if len(lines) > max_lines:
            break
    if len(lines) < 2 or any(len(line) > 88 for line in lines[:max_lines]):
        return ""
    return "\n".join(lines[:max_lines])


def clean_docstring(docstring: str | None) -> str:
    """The first whole sentences of a docstring as one line of at most 260 characters, or "" if there are none."""
    for paragraph in re.split(r"\n\s*\n", docstring or ""):
        text = re.sub(r":\w+:`~?([^`]*)`", r"\1", paragraph)  # :class:`X` -> X
        text = re.sub(r"``?([^`']+)(?:``?|'')", r"\1", text)
        text = re.sub(r"\s+", " ", text).strip()
        if len(text) < 16 or not text.isascii() or not _reads_like_prose(text):
            continue
        return _whole_sentences(text)
    return ""


def _reads_like_prose(text: str) -> bool:
    """Not a signature, a doctest, a table or a list of names."""
    if re.match(r"[\w.]+\(.*\)|>>>|[-*=+|#$@:<]|\w+ ?[:=]", text) or "->" in text or "--" in text[:40]:
        return False
    words = re.findall(r"[A-Za-z]+", text)
    return len(words) >= 4 and sum(map(len, words)) >= 0.7 * len(text.replace(" ", ""))


def _whole_sentences(text: str) -> str:
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    answer = sentences[0]
    for sentence in sentences[1:]:
        if len(answer) + 1 + len(sentence) > _MAX_ANSWER_CHARS:
            break
        answer += " " + sentence
    if len(answer) > _MAX_ANSWER_CHARS:
        answer = answer[:_MAX_ANSWER_CHARS].rsplit(", ", 1)[0].rsplit(" (", 1)[0]
        if len(answer) > _MAX_ANSWER_CHARS - 3:
            answer = answer.rsplit(" ", 1)[0]
    answer = answer.rstrip(" :;,")
    return answer if answer[-1] in ".!?" else answer + "."


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name in {"__init__", "__enter__", "__exit__", "__iter__"}


# ---------------------------------------------------------------- forms of question


def _what_does_it_do(definition: Definition) -> tuple[str, str] | None:
    if not definition.documentation:
        return None
    questions = {
        "module": ("What is the module {} for?", "What does the module {} do?"),
        "class": ("What is {}?", "What is the class {} for?"),
        "function": ("What does {} do?", "What is {} for?"),
        "method": ("What does {} do?", "What does the method {} do?"),
    }
    return _ask(definition, questions[definition.kind]), definition.documentation


def _explain_with_name(definition: Definition) -> tuple[str, str] | None:
    if not definition.documentation:
        return None
    question = _ask(definition, ("Explain {}.", "Tell me about {}.", "Describe {} briefly."))
    where = f"of the class {definition.name.rpartition('.')[0]}" if definition.kind == "method" else ""
    where = where or f"of the module {definition.module}"
    what = "" if definition.kind == "module" else f" is a {definition.kind} {where}"
    opening = f"{definition.full_name}{what or ' is a module of the standard library'}."
    return question, f"{opening} {definition.documentation}"


def _show_signature(definition: Definition) -> tuple[str, str] | None:
    if not definition.signature or len(definition.signature) > 120:
        return None
    question = _ask(definition, ("Show the signature of {}.", "How is {} called?", "What is the signature of {}?"))
    return question, f"```python\n{definition.signature}\n```\n{definition.documentation}".rstrip()


def _name_parameters(definition: Definition) -> tuple[str, str] | None:
    if not definition.signature or not definition.documentation:
        return None
    question = f"Which arguments does this function take?\n\n```python\n{definition.signature}\n```"
    if not definition.parameters:
        return question, f"The function {definition.signature.partition('(')[0]} takes no arguments."
    some = definition.parameters[:_MAX_NAMES]
    noun = "argument" if len(some) == 1 else "arguments"
    return question, f"The function {definition.signature.partition('(')[0]} takes the {noun} {_listed(some)}."


def _document_this(definition: Definition) -> tuple[str, str] | None:
    if not definition.first_lines or not definition.documentation:
        return None
    return f"What does this function do?\n\n```python\n{definition.first_lines}\n```", definition.documentation


def _write_first_lines(definition: Definition) -> tuple[str, str] | None:
    if not definition.first_lines:
        return None
    question = _ask(definition, ("Write the first lines of {}.", "How does the source of {} begin?"))
    return question, f"```python\n{definition.first_lines}\n```"


def _name_members(definition: Definition) -> tuple[str, str] | None:
    if len(definition.members) < 2:
        return None
    some, more = definition.members[:_MAX_NAMES], len(definition.members) > _MAX_NAMES
    noun = "functions" if definition.kind == "module" else "methods"
    question = _ask(definition, (f"Which {noun} does the {definition.kind} {{}} have?", f"Name {noun} of {{}}."))
    return question, f"The {definition.kind} {definition.full_name} has the {noun} {_listed(some)}" + (
        ", among others." if more else "."
    )


_FORMS: tuple[Callable[[Definition], tuple[str, str] | None], ...] = (
    _what_does_it_do,
    _show_signature,
    _explain_with_name,
    _name_parameters,
    _document_this,
    _write_first_lines,
    _name_members,
)


def _ask(definition: Definition, questions: tuple[str, ...]) -> str:
    return questions[_hash(definition.full_name) % len(questions)].format(definition.full_name)


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
