"""The tables of docs/method.md are those that the code reads."""

from dataclasses import astuple
from pathlib import Path

from aot_vllm import AOTConfig
from aot_vllm.presets import DEFAULTS, PRESETS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text(encoding="utf-8")


def rows(heading):
    """The cells of the table under a heading, row by row."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_each_architecture_stands_with_its_default_and_all_the_evidence_for_it():
    expected = []
    for architecture, default in DEFAULTS.items():
        first, *others = default.evidence
        expected.append([f"`{architecture}`", f"`{default.preset}`", *astuple(first)])
        expected += [["", "", *astuple(evidence)] for evidence in others]
    assert rows("The defaults, and the evidence for them") == expected


def test_each_preset_stands_with_what_it_does():
    table = {name.strip("`"): cells for name, *cells in rows("The presets")}
    assert table.keys() == PRESETS.keys()
    for name, (anchors, within, across, emission) in table.items():
        config = AOTConfig.preset(name)
        assert anchors.split(",")[0] == f"`{config.anchors}`"
        assert emission == f"`{config.emit}`"
        moved = f"`mass` {config.mass:g}, `nearest_weight` {config.nearest_weight:g}"
        assert within == (moved if config.mass or config.nearest_weight else "nothing moves")
        assert across == (f"{config.clips} clips, `kappa` {config.kappa:g}" if config.kappa < 1 else "nothing moves")
