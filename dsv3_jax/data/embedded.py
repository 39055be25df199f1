"""The embedded corpus: real text out of the installed dependencies and the running Python, and generated arithmetic.

Nothing is downloaded and nothing is shipped: `constraints.txt` pins what is read, so the same installation gives the same
bytes (printed with their SHA-256). A Python file is read either as source or for its docstrings, never both. Long files are
several documents: one of them may be held out while training sees the others, which share its names but not its text.
"""

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dsv3_jax.data.arithmetic import arithmetic_documents
from dsv3_jax.data.documents import Document, split_long

DOMAINS = ("python", "english", "c", "licences", "markup", "arithmetic")
CAPS = {"python": 9_000_000, "english": 7_000_000, "c": 3_000_000, "licences": 2_000_000, "markup": 2_000_000}
ARITHMETIC_BYTES = 1_500_000
# Characters; longer files are cut, so that one file cannot fill the held-out text; finer where there is little text.
PIECE = {"python": 8_000, "english": 8_000, "c": 8_000, "licences": 3_000, "markup": 3_000}
FILE_CAP = 300_000  # larger files are tables or generated
SHORTEST = 200
DIGIT_SHARE = 0.15  # above it, a file is a table of numbers

STDLIB = "stdlib"
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

DOCSTRING_PACKAGES = ("numpy", "scipy", "matplotlib", "optax", "tensorstore")
SOURCE_PACKAGES = (
    STDLIB, "jax", "flax", "orbax-checkpoint", "grain", "etils", "absl-py", "einops", "tqdm", "jaxtyping", "treescope",
    "fonttools", "rich", "huggingface-hub", "pillow", "protobuf", "fsspec", "humanize", "psutil", "pyparsing", "packaging",
)  # fmt: skip
OTHER_PACKAGES = ("jaxlib", "ml-dtypes", "tokenizers", "pygments", "contourpy", "kiwisolver", "cycler", "python-dateutil",
                  "pyyaml", "typing-extensions", "msgpack", "simplejson", "uvloop", "aiofiles")  # fmt: skip
PACKAGES = DOCSTRING_PACKAGES + SOURCE_PACKAGES + OTHER_PACKAGES
MARKUP = (".html", ".xml", ".svg", ".js", ".css", ".yaml", ".toml", ".sh", ".po", ".mplstyle", ".proto", ".def")
LICENCE = re.compile(r"(?i)/(licen[sc]e|copying|notice|copyright)[^/.]*(\.(txt|md|rst|apache|bsd))?$")
SKIPPED_DIRECTORIES = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings", "sboms",
}  # fmt: skip


def documents() -> Iterator[Document]:
    """All documents, copies included, in a fixed order."""
    for domain, texts in _readers().items():
        size = 0
        for text in texts():
            for piece in split_long(text, PIECE[domain]):
                if len(piece) >= SHORTEST and size < CAPS[domain]:
                    size += len(piece.encode())
                    yield Document(domain, piece)
            if size >= CAPS[domain]:
                break
    for text in arithmetic_documents(ARITHMETIC_BYTES):
        yield Document("arithmetic", text)


def fingerprint() -> str:
    """Digest of what the documents depend on besides this code: the versions of Python and of the packages."""
    versions = [f"{name}=={version}" for name in sorted(PACKAGES) if (version := _version(name))]
    parts = ["embedded", platform.python_version(), str(_include()), *versions]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _readers() -> dict[str, Callable[[], Iterable[str]]]:
    """Domain -> its texts. Licences first: a licence quoted in a source is the copy, not the other way round."""
    return {
        "licences": lambda: _texts(_files(PACKAGES, _is_licence)),
        "english": _english,
        "python": lambda: _sources(r"#[^\n]*\n", _files(SOURCE_PACKAGES, _is_python)),
        "c": lambda: _sources(r"/\*.*?\*/|//[^\n]*\n", [*_files(PACKAGES, _is_c), *_headers()]),
        "markup": lambda: _texts(_files(PACKAGES, lambda name: name.endswith(MARKUP))),
    }


def _is_licence(name: str) -> bool:
    return bool(LICENCE.search(name))


def _is_python(name: str) -> bool:
    unwanted = name.endswith(("_test.py", "_pb2.py", "_gen.py")) or "/_sysconfigdata" in name  # the last holds local paths
    return name.endswith(".py") and not unwanted


def _is_c(name: str) -> bool:
    return name.endswith((".h", ".hpp", ".cc", ".cpp")) or (name.endswith(".c") and "/numpy/" in name)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _include() -> Path | None:
    path = Path(sysconfig.get_paths()["include"])
    return path if (path / "Python.h").exists() else None


def _headers() -> list[Path]:
    include = _include()
    return _shuffled((str(path), str(path.relative_to(include))) for path in include.rglob("*.h")) if include else []


@functools.cache  # listing 50,000 files takes seconds, and every domain asks
def _installed(package: str) -> tuple[tuple[str, str], ...]:
    """(path, portable name) of the package's files; none if it is not installed. "stdlib" is the standard library."""
    found: list[tuple[str, str]] = []
    if package == STDLIB:
        root = sysconfig.get_paths()["stdlib"]
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED_DIRECTORIES]
            found += [(f"{folder}/{name}", f"{package}{folder[len(root) :]}/{name}") for name in names]
    elif _version(package):
        for file in importlib.metadata.files(package) or []:
            if not SKIPPED_DIRECTORIES.intersection(file.parts):
                found.append((str(file.locate()), f"{package}/{file}"))
    return tuple(found)


def _files(packages: Iterable[str], wanted: Callable[[str], bool]) -> list[Path]:
    """Files of the packages whose name is wanted, in an order that mixes the packages."""
    return _shuffled(pair for package in packages for pair in _installed(package) if wanted(pair[0]))


def _shuffled(paths: Iterable[tuple[str, str]]) -> list[Path]:
    """By the hash of the portable name, so that a byte cap takes a sample and not the first letters of the alphabet."""
    return [Path(path) for path, name in sorted(paths, key=lambda pair: hashlib.sha256(pair[1].encode()).digest())]


def _texts(paths: Iterable[Path]) -> Iterator[str]:
    """Contents of the files that are UTF-8 text, not too large, and not tables of numbers."""
    for path in paths:
        if not path.is_file() or path.stat().st_size > FILE_CAP:
            continue
        try:
            text = path.read_bytes().decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # binary data and legacy encodings among the packages' files are not text for us
        if "\0" not in text and sum(map(text.count, "0123456789")) <= DIGIT_SHARE * len(text):
            yield text


def _sources(comments: str, paths: Iterable[Path]) -> Iterator[str]:
    return (_without_header(comments, text) for text in _texts(paths))


def _without_header(comments: str, text: str) -> str:
    """A source without its leading comments: hundreds of files open with the same licence."""
    return re.sub(rf"\A(?:\s*(?:{comments}))+\s*", "", text, flags=re.DOTALL)


def _english() -> Iterator[str]:
    """Descriptions of the packages, the language reference as `help()` knows it, and docstrings of modules."""
    for package in PACKAGES:
        if _version(package):
            yield importlib.metadata.metadata(package).json.get("description", "")  # type: ignore[misc]
    yield from _texts(_files(PACKAGES, lambda name: name.endswith((".md", ".rst")) and not _is_licence(name)))
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        topics = {}
    yield from (topics[name] for name in sorted(topics))
    for source in _texts(_files(DOCSTRING_PACKAGES, _is_python)):
        if text := docstrings(source):
            yield text


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, without doctests; empty if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = [ast.get_docstring(node) for node in _definitions(tree)]
    return "\n\n".join(_without_doctests(text) for text in found if text and len(text) > 80)


def _definitions(node: Documented) -> Iterator[Documented]:
    """The node and the classes and functions in its body, in the order of the source."""
    yield node
    for child in node.body:
        if isinstance(child, Documented):
            yield from _definitions(child)


def _without_doctests(text: str) -> str:
    """Drops every paragraph with a prompt in it: prompt and printed result are code, not prose."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(paragraph for paragraph in paragraphs if ">>>" not in paragraph)
