"""The pages agree with the tree: links lead somewhere, symbols and messages that they name exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("chaos/*.md")])
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
# Messages in the troubleshooting page that vLLM, NCCL, torch or ZeroMQ write, not this package.
OTHERS = ("CUDA out of memory", "Assertion failed", "inproc-engine mode", "Mismatched NCCL")
# What the operating system says behind our own words.
SYSTEM = (
    "No such file or directory",
    "Address already in use",
    "Cannot assign requested address",
    "Connection reset by peer",
)


def text_of(page: Path) -> str:
    """The page without its code blocks, in which brackets mean something else."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the page's headings."""
    heads = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", head).lower()).replace(" ", "-") for head in heads]
    return set(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for _, target in LINK.findall(text_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def defined(file: Path) -> set[str]:
    """Names of classes and functions in a module, methods as ``Class.method`` too."""
    names: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                names.update({child.name, prefix + child.name})
                visit(child, f"{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    visit(ast.parse(file.read_text()), "")
    return names


def test_the_life_of_an_update_names_symbols_that_exist() -> None:
    page = ROOT / "docs" / "life-of-an-update.md"
    assert len(page.read_text().splitlines()) <= 80
    named = [(name.strip("`"), target) for name, target in LINK.findall(page.read_text()) if target.endswith(".py")]
    assert len(named) > 20
    missing = [f"{target}: {name}" for name, target in named if name not in defined((page.parent / target).resolve())]
    assert not missing


@cache
def literals() -> tuple[str, ...]:
    """Every string of the package; what an f-string fills in is ``…``."""
    found: list[str] = []
    for file in ROOT.glob("areal_vllm_ext/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(re.sub(r"%[sd]|%\.\d?f", "…", one) for one in found)


def messages() -> list[str]:
    """What the tables of the troubleshooting page have in backquotes in their first column."""
    rows = [line for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    assert len(messages()) > 60
    unknown = []
    for message in messages():
        if any(other in message for other in OTHERS):
            continue
        ours = re.sub("|".join(SYSTEM), "", message)
        fragments = [fragment.strip(" .:,;()'\"") for fragment in ours.split("…")]
        long = [fragment for fragment in fragments if len(fragment) > 3]
        if not all(any(fragment in literal for literal in literals()) for fragment in long):
            unknown.append(message)
    assert not unknown, "\n".join(unknown)
