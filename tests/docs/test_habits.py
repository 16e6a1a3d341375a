"""The documents keep the habits of the house: links lead somewhere, versions agree, nothing is missing."""

import re
import shlex
import sys
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "demo" / "model" / "README.md"])
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
DECISIONS = ROOT / "docs" / "decisions"


def prose(page):
    """A page without its blocks of code, in which nothing is a link or a heading."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page):
    """The relative links of a page."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page):
    """The anchors that a code host makes of a page's headings; a repeated heading gets a number."""
    made = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        made.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return {f"{name}-{made[:place].count(name)}" if name in made[:place] else name for place, name in enumerate(made)}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_relative_link_leads_to_a_file_and_to_a_heading_in_it(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_links_are_found_at_all():
    assert sum(len(links(page)) for page in PAGES) > 100
    assert any("#" in link for page in PAGES for link in links(page))


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("With containers", "with-containers"),
        ("`aot_vllm/`, the plugin", "aot_vllm-the-plugin"),
        ("[0.2.0] - 2026-11-25", "020---2026-11-25"),
        ("0001: Anchors are chosen", "0001-anchors-are-chosen"),
    ],
)
def test_anchors_are_made_as_code_hosts_make_them(tmp_path, heading, anchor):
    page = tmp_path / "page.md"
    page.write_text(f"# {heading}\n\n```console\n# no heading\n```\n\n## {heading}\n", encoding="utf-8")
    assert anchors(page) == {anchor, f"{anchor}-1"}


def test_every_variable_of_the_gateway_that_is_named_anywhere_is_a_setting():
    suffixes = {".py", ".md", ".yaml", ".yml", ".json", ".sh", ".toml"}
    folders = ("aot_vllm", "server", "deploy", "docker", "loadtest", "bench", "demo", "docs")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("README.md", "compose.yaml", "Makefile", "CONTRIBUTING.md")]
    named = {}
    for file in files:
        if file.suffix in suffixes or file.name == "Makefile" or "Dockerfile" in file.name:
            for name in re.findall(r"AOT_GATEWAY_[A-Z_]*[A-Z]\b(?!_)", file.read_text(encoding="utf-8")):
                named.setdefault(name, str(file))
    assert len(named) > 40
    known = {f"AOT_GATEWAY_{name.upper()}" for name in Settings.model_fields}
    assert {name: file for name, file in named.items() if name not in known} == {}


def test_the_glossary_is_linked_from_the_readme_and_the_main_pages():
    for name in ("README.md", "CONTRIBUTING.md", "docs/accuracy.md", "docs/gateway.md", "docs/operate.md"):
        assert any(link.endswith("glossary.md") for link in links(ROOT / name)), name


def test_the_citation_has_the_required_keys_and_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert citation["version"] == VERSION
    [paper] = citation["references"]
    assert all(paper[key] for key in ("type", "title", "authors"))
    assert {"type": "other", "value": "arXiv:2603.01400"}.items() <= paper["identifiers"][0].items()


def sections_of_the_changelog():
    return re.findall(
        r"^## \[([^\]]+)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_the_changelog_begins_with_what_is_unreleased_and_has_a_section_for_the_version():
    sections = sections_of_the_changelog()
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == VERSION
    dates = [date.fromisoformat(day) for _, day in sections[1:]]
    assert dates == sorted(dates, reverse=True)


def test_citation_and_changelog_agree_on_the_date():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert dict(sections_of_the_changelog())[VERSION] == citation["date-released"]


def hooks():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    return {hook["id"]: hook for hook in repositories[0]["hooks"]}


@pytest.mark.parametrize("name", sorted(hooks()))
def test_every_hook_runs_a_make_target_or_a_program_of_the_environment_and_installs_nothing(name):
    hook = hooks()[name]
    assert hook["language"] == "system"
    command, *rest = shlex.split(hook["entry"])
    if command == "make":
        assert re.search(rf"^{re.escape(rest[0])}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert command.startswith(".venv/bin/")
        assert (Path(sys.executable).parent / Path(command).name).exists()


def test_every_decision_is_in_the_index_under_its_number():
    pages = {page.name for page in DECISIONS.glob("*.md")} - {"README.md"}
    assert pages
    index = re.findall(r"\| \[(\d{4})\]\(([^)]+)\) \|", (DECISIONS / "README.md").read_text(encoding="utf-8"))
    assert {name for _, name in index} == pages
    assert len(index) == len(pages)
    assert all(name.startswith(f"{number}-") for number, name in index)


@pytest.mark.parametrize("page", sorted(DECISIONS.glob("0*.md")), ids=lambda page: page.stem)
def test_every_decision_has_the_form_of_the_index(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.stem[:4]}: ")
    assert re.search(r"^Status: (accepted|replaced by \[)", text, re.MULTILINE)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Context", "Decision", "Evidence", "Consequences", "When to reconsider"]
