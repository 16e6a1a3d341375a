"""What the README says is so: its settings, its numbers, its files and commands."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from aot_vllm.adapters.settings import PluginSettings
from aot_vllm.config import AOTConfig
from aot_vllm.errors import SettingError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def settings_table():
    section = README.split("## Settings of the plugin")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    return {name.strip("`"): (json.loads(default.strip("`")), allowed) for name, default, allowed, _ in rows}


def test_the_settings_table_lists_every_setting_with_its_default():
    actual = {field.name: field.default for field in fields(PluginSettings) if field.name != "method"}
    actual |= AOTConfig().settings() | {"preset": None, "allowed_presets": []}
    assert {name: default for name, (default, _) in settings_table().items()} == actual


@pytest.mark.parametrize("name", sorted(settings_table()))
def test_what_the_settings_table_does_not_allow_is_refused(name):
    _, allowed = settings_table()[name]
    outside = {
        "[0, 1]": (-0.1, 1.1),
        "above 0": (0, -1),
        "at least 0": (-1,),
        "at least 1": (0, 1.5),
        "`true`, `false`": (1, "true"),
        '`"both"`, `"compact"`': ("all", None),
        '`"diverse"`, `"attention"`, `"calibrated"`, `"coverage"`': ("random", None),
        '`"euclidean"`, `"cosine"`': ("manhattan", None),
        '`"previous"`, `"carried"`, `"all"`': ("none", None),
        '`"auto"`, `"triton"`, `"torch"`': ("cuda", None),
        "a layer of the tower": (1.5, None),
        "the name of a preset, or `null`": ("newest",),
        "a list of presets": (["newest"], None),
        "a layer of the tower, or `null`": (1.5, "3"),
    }
    for value in (*outside[allowed], "text", [] if allowed != "a list of presets" else {}, float("nan")):
        with pytest.raises(SettingError, match=name):
            PluginSettings.from_additional_config({"aot": {name: value}})


def test_its_tables_of_numbers_and_those_of_docs_are_what_the_benchmarks_wrote():
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    marked = re.compile(r"<!-- (bench/results/\S+): (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
    included = [part for page in pages for part in marked.findall(page)]
    assert {part for _, part, _ in included} == set(MARKS)
    for source, part, text in included:
        sections = (ROOT / source).read_text().split("\n\n")
        table = next(section for section in sections if MARKS[part] in section)
        machine = sections[-1].strip()
        assert text.strip().split("\n\n") == [table.strip(), machine], f"{source}: {part}"


MARKS = {
    "load": "TTFT",
    "stages": "share of one request",
    "reduce": "against the products",
    "decode": "running",
    "gateway": "added by",
    "fidelity": "| kept |",
    "ablations": "| kept |",
    "transport": "| kept |",
}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_what_it_links_to_exists(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_what_it_tells_to_make_can_be_made(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("script", sorted(set(re.findall(r"`python (bench/\S+\.py)`", README))))
def test_the_benchmarks_it_names_exist(script):
    assert (ROOT / script).is_file()
