"""Tasks from the functions that docstrings document, for which every Python has the texts, as for `docstrings`.

* `traits`: what does the code of a function do? The first paragraph of its docstring goes in; out come any number of
  `TRAITS`, which are read off the syntax tree: does it return a value, raise, loop?
* `pairs`: do two paragraphs stand in one docstring? In half of the pairs they do; in the others the second is from
  another package. Which package that is says nothing, so names are not hidden, as they are in `docstrings`.

The whole standard library serves, but for tests. The split is by module, every choice is a hash of the text, and a text
that occurs twice is kept once, or not at all if its answers differ.
"""

import ast
import functools
import re
from collections import defaultdict

from . import docstrings

LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}
FEWEST_WORDS = 4
TRAITS_HELD_OUT, PAIRS_HELD_OUT = 4, 2  # every so many-th module is for dev
PAIRS_DEV = 300  # at most, to save time
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
TRAITS = {
    "arguments": "takes arguments beside self",
    "branches": "has an if",
    "catches": "has a try",
    "decorated": "has decorators",
    "defaults": "has arguments with defaults",
    "loops": "has a loop or a comprehension",
    "method": "stands in a class",
    "raises": "has a raise",
    "returns": "returns a value",
    "sets": "sets attributes of self",
}


def read_sources(stdlib=None):
    """Returns a list of (package, dotted module name, syntax tree) of the whole standard library, sorted by name."""
    return _read_folder(docstrings.stdlib_folder(stdlib))


@functools.cache
def _read_folder(folder):
    paths = (path for path in sorted(folder.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(folder).parts))
    return [docstrings.read_source(path, folder, path.relative_to(folder).with_suffix("").parts[0]) for path in paths]


def split(examples, held_out):
    """Splits tuples that end with a module by a hash of its name, which is left out: returns those of train, of dev."""
    parts = ([], [])
    for *example, module in examples:
        parts[int(docstrings.stable_hash(module), 16) % held_out == 0].append(tuple(example))
    return parts


# ---- What code does ------------------------------------------------------------------------------------------------


def traits(node, in_class):
    """Returns the keys of `TRAITS` that hold for a function's syntax tree, as a set."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    body = list(_own_nodes(node))
    found = {
        "arguments": len([one for one in arguments if one is not None]) > in_class,
        "branches": _has(body, ast.If, ast.IfExp),
        "catches": _has(body, ast.Try),
        "decorated": bool(node.decorator_list),
        "defaults": bool(node.args.defaults or any(node.args.kw_defaults)),
        "loops": _has(body, *LOOPS),
        "method": in_class,
        "raises": _has(body, ast.Raise),
        "returns": any(isinstance(one, ast.Return) and not _is_none(one.value) for one in body),
        "sets": any(_is_of_self(one) for one in body if isinstance(one, ast.Attribute)),
    }
    return {name for name, holds in found.items() if holds}


def _own_nodes(node):
    """Yields the nodes of a function's body, without those of functions and classes inside it."""
    to_do = list(node.body)
    while to_do:
        one = to_do.pop()
        yield one
        if not isinstance(one, (*docstrings.DEFINITIONS, ast.Lambda)):
            to_do += ast.iter_child_nodes(one)


def _has(nodes, *kinds):
    return any(isinstance(one, kinds) for one in nodes)


def _is_none(value):
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _is_of_self(attribute):
    stored = isinstance(attribute.ctx, ast.Store)
    return stored and isinstance(attribute.value, ast.Name) and attribute.value.id == "self"


def build_traits(stdlib=None):
    """Builds the task `traits`.

    Args:
        stdlib: folder of the standard library; by default that of the running Python.

    Returns:
        Two lists of (text, set of traits), train and dev, in an order that is fixed but mixes modules.
    """
    found = defaultdict(list)
    for _, module, tree in read_sources(stdlib):
        for node, in_class in functions(tree):
            text = " ".join(re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0].split())
            if docstrings.count_words(text) >= FEWEST_WORDS:
                found[docstrings.letters(text)].append((text, traits(node, in_class), module))
    agreed = [group[0] for group in found.values() if all(own == group[0][1] for _, own, _ in group)]
    agreed.sort(key=lambda one: docstrings.stable_hash(one[0]))
    return split(agreed, TRAITS_HELD_OUT)


def functions(tree):
    """Yields (function, whether it stands in a class)."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node, isinstance(parent, ast.ClassDef)


# ---- Which paragraphs belong together ------------------------------------------------------------------------------


def build_pairs(stdlib=None, train_cap=None):
    """Builds the task `pairs`.

    Args:
        stdlib: folder of the standard library; by default that of the running Python.
        train_cap: at most this many training pairs.

    Returns:
        Two lists of (first text, second text, "same" or "other"), train and dev, in a fixed order.
    """
    found, seen = [], set()
    for package, module, tree in read_sources(stdlib):
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, *docstrings.DEFINITIONS)):
                texts = docstrings.prose_of(node)[:2]
                own = set(map(docstrings.letters, texts))
                if len(own) == 2 and not own & seen:
                    found.append((*texts, package, module))
                    seen |= own
    found.sort(key=lambda one: docstrings.stable_hash(*one[:2]))
    train, dev = split(found, PAIRS_HELD_OUT)
    return _matched(train[:train_cap]), _matched(dev[:PAIRS_DEV])


def _matched(found):
    """Returns pairs of which half belong together; the others' second texts change places, between packages alone."""
    same, others = found[::2], sorted(found[1::2], key=lambda one: one[2])
    half = len(others) // 2  # no package has more than half of them, so that this many places on there is another one
    moved = [(one[0], other[1], "other") for one, other in zip(others, others[half:] + others[:half], strict=True)]
    return sorted([(*one[:2], "same") for one in same] + moved, key=lambda one: docstrings.stable_hash(*one[:2]))
