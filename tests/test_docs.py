"""README and docs: flags match the parsers, links lead somewhere, the README stays short."""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES, WORDS = 250, 2000  # of the README, which a reader should finish


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_flags_page_is_what_the_parsers_say():
    """In a process of its own, as importing the scripts loads much that other tests need not wait for."""
    made = subprocess.run([sys.executable, "-c", "from docs.make_flags import page; print(page(), end='')"], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/flags.md").read_text() == made, "run python docs/make_flags.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links {target}"


def test_every_page_is_linked_from_the_readme():
    linked = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in linked] == []


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= LINES and len(text.split()) <= WORDS


def test_scripts_named_in_the_pages_exist():
    """What follows `python` or a launcher in a command is a file of this repository."""
    for page in PAGES:
        for block in re.findall(r"```[^\n]*\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for name in re.findall(r"(?<![\w/.])([a-z_0-9]+(?:/[a-z_0-9]+)*\.(?:py|sh))\b", block):
                assert (ROOT / name).exists(), f"{page.name} names {name}"
    assert importlib.util.find_spec("sampling.pipeline")  # the target of README's `from pipeline import`
