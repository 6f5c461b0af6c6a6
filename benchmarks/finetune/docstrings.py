"""A text-classification task that every Python carries: which package does this docstring paragraph come from?

The sources of the standard library are parsed, never imported, so the task needs no network and no display; packages
that this Python ships without sources are left out. The text depends on the Python version, hence the fingerprint that
is printed with every result.

What keeps the task honest:

* Answers are hidden. One list of names serves all paragraphs, whatever their label, so that hiding gives nothing away:
  names of the packages (also inside longer words), names of their modules, names their code defines (unless paragraphs
  of `ORDINARY` packages or more use the word, as they do "read" or "value"), and whatever looks like code (`foo_bar`,
  `foo.bar`, `fooBar`, `foo(`). Each becomes `HIDDEN`.
* The split is by module: all paragraphs of a module are in train, or all are in dev.
* Paragraphs that are equal once only their letters count appear once; those that two packages share, never.
* Every choice is a hash of the text itself: no random state, no order of files.
"""

import ast
import hashlib
import re
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

# The label and the folders of the standard library that belong to it.
PACKAGES = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "http": ("http",),
    "importlib": ("importlib",),
    "logging": ("logging",),
    "multiprocessing": ("multiprocessing", "concurrent"),
    "tkinter": ("tkinter",),
    "unittest": ("unittest",),
    "urllib": ("urllib",),
    "xml": ("xml",),
}
HIDDEN = "X"
ORDINARY = 3
MIN_WORDS = 8
MIN_PARAGRAPHS = 60  # a package with fewer is left out
TRAIN_CAP, DEV_CAP = 150, 35  # per package, so that no label dominates
DEV_SHARE = 0.25

WORD = re.compile(r"\w+(?:\.\w+)*(?:\()?")
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of a docstring: its text, the package that is its label, and the module it stands in."""

    text: str
    package: str
    module: str


def stable_hash(*parts):
    """Returns a hexadecimal hash of strings that is the same in every process and on every machine."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def read_sources(stdlib=None):
    """Parses the packages' modules.

    Args:
        stdlib: folder of the standard library; by default that of the running Python.

    Returns:
        A list of (package, dotted module name, syntax tree), sorted by name.
    """
    stdlib = stdlib_folder(stdlib)
    sources = []
    for package, folders in PACKAGES.items():
        paths = sorted(path for folder in folders for path in (stdlib / folder).rglob("*.py"))
        paths = [path for path in paths if not {"test", "tests"} & set(path.relative_to(stdlib).parts)]
        sources += [read_source(path, stdlib, package) for path in paths]
    return sources


def stdlib_folder(stdlib=None):
    """Returns the folder of the running Python's standard library, or the one that is given."""
    return Path(stdlib or sysconfig.get_path("stdlib"))


def read_source(path, stdlib, package):
    """Parses one module: (package, dotted module name, syntax tree)."""
    module = path.relative_to(stdlib).with_suffix("").parts
    module = module[:-1] if module[-1] == "__init__" else module
    return package, ".".join(module), ast.parse(path.read_bytes())


def extract_paragraphs(sources):
    """Returns the paragraphs of all docstrings that are prose: no doctest, and at least `MIN_WORDS` words."""
    found = []
    for package, module, tree in sources:
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, *DEFINITIONS)):
                found += [Paragraph(text, package, module) for text in prose_of(node)]
    return found


def prose_of(node):
    """Returns the paragraphs of a definition's or a module's docstring that are prose, each in one line."""
    texts = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    return [" ".join(text.split()) for text in texts if ">>>" not in text and count_words(text) >= MIN_WORDS]


def count_words(text):
    """Returns how many words of two letters or more a text has, hidden names not counted."""
    return len(re.findall(r"[A-Za-z]{2,}", text))


def letters(text):
    """Returns a text's letters alone, by which two paragraphs are the same."""
    return "".join(re.findall(r"[a-z]+", text.lower()))


def stem(word):
    """Returns a word without case and plural."""
    return word.lower().rstrip("s")


def defined_names(tree):
    """Yields every name that a module defines: classes, functions, parameters and module-level variables."""
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def names_to_hide(sources, paragraphs):
    """Returns the stems of the words that give an answer away: names of modules, and names that modules define."""
    modules = {stem(part) for _, module, _ in sources for part in module.strip("_").split(".")}
    modules |= {part.strip("_") for part in modules}
    used_by = defaultdict(set)
    for paragraph in paragraphs:
        for word in re.findall(r"[A-Za-z]+", paragraph.text):
            used_by[stem(word)].add(paragraph.package)
    defined = {stem(name.strip("_")) for _, _, tree in sources for name in defined_names(tree)}
    return (modules | {name for name in defined if len(used_by[name]) < ORDINARY}) - {""}


def looks_like_code(word):
    """Tells whether a word is spelled as code spells names: `foo_bar`, `foo.bar`, `fooBar`, `foo(`."""
    if "_" in word or word.endswith("(") or re.search(r"[a-z][A-Z]|[A-Za-z]\d", word):
        return True
    return any(len(part) > 1 for part in word.split(".")[1:])


def hide_names(text, hidden):
    """Replaces each word that gives an answer away by `HIDDEN`, and runs of `HIDDEN` by one.

    Args:
        text: a paragraph.
        hidden: stems of words to hide, from `names_to_hide`.

    Returns:
        The paragraph as the model sees it.
    """
    folders = [folder for folders in PACKAGES.values() for folder in folders]

    def replace(match):
        word = match.group()
        tells = stem(word) in hidden or any(folder in word.lower() for folder in folders)
        return HIDDEN + "(" * word.endswith("(") if tells or looks_like_code(word) else word

    text = WORD.sub(replace, text)
    return re.sub(rf"\b{HIDDEN}(?:\W+{HIDDEN}\b)+", HIDDEN, text)


def without_duplicates(paragraphs):
    """Keeps one of several paragraphs with the same letters, and none that occurs in two packages."""
    groups = defaultdict(list)
    for paragraph in paragraphs:
        groups[letters(paragraph.text)].append(paragraph)
    unshared = [group for group in groups.values() if len({p.package for p in group}) == 1]
    return in_fixed_order(min(group, key=lambda p: (p.module, p.text)) for group in unshared)


def in_fixed_order(paragraphs):
    """Sorts paragraphs by a hash of their text, which mixes packages and modules."""
    return sorted(paragraphs, key=lambda p: stable_hash(p.text))


def dev_modules(paragraphs):
    """Chooses the modules of one package that form its dev split: about `DEV_SHARE` of the paragraphs, never all."""
    sizes = Counter(p.module for p in paragraphs)
    chosen, taken, room = set(), 0, DEV_SHARE * len(paragraphs)
    for module in sorted(sizes, key=stable_hash):
        if taken + sizes[module] <= 1.4 * room and taken < room:
            chosen.add(module)
            taken += sizes[module]
    return chosen or {min(sizes, key=lambda module: (sizes[module], module))}


def build(stdlib=None, train_cap=TRAIN_CAP):
    """Builds the task from a standard library.

    Args:
        stdlib: folder of the standard library; by default that of the running Python.
        train_cap: at most this many training paragraphs of each package.

    Returns:
        Two lists of `Paragraph`, train and dev, in an order that is fixed but mixes the packages.
    """
    sources = read_sources(stdlib)
    paragraphs = extract_paragraphs(sources)
    hidden = names_to_hide(sources, paragraphs)
    masked = [Paragraph(hide_names(p.text, hidden), p.package, p.module) for p in paragraphs]
    masked = without_duplicates([p for p in masked if count_words(p.text) >= MIN_WORDS])
    train, dev = [], []
    for package in PACKAGES:
        own = [p for p in masked if p.package == package]
        if len(own) >= MIN_PARAGRAPHS:
            held_out = dev_modules(own)
            train += [p for p in own if p.module not in held_out][:train_cap]
            dev += [p for p in own if p.module in held_out][:DEV_CAP]
    return in_fixed_order(train), in_fixed_order(dev)


def in_pairs(paragraphs):
    """Returns each paragraph with the next one, the last with the first: inputs that concern one package or two."""
    return list(zip(paragraphs, [*paragraphs[1:], *paragraphs[:1]], strict=True))
