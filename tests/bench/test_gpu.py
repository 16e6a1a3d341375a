"""The GPU benchmark: its work is what its models do, its tables are whole, and a fault in a reduction is reported."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aot_vllm import VideoGrid, budget, reduce_video
from bench import gpu
from bench.on_gpu import calls, choices, models, sizes
from bench.on_gpu.paths import operations

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
META = torch.device("meta")
RETENTIONS = (1.0, 0.25, 0.10)


def measured():
    return gpu.measure(gpu.TINY[0], CPU, gpu.paths(CPU), retentions=RETENTIONS, repeats=1)


@pytest.fixture(scope="module")
def results():
    with torch.inference_mode():
        return [gpu.measure(case, CPU, gpu.paths(CPU), retentions=RETENTIONS, repeats=1) for case in gpu.TINY]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_reduction_has_a_line_and_every_line_a_value_for_every_column(results):
    head, rule, *rows = gpu.reductions_table(results).splitlines()
    paths, anchors = gpu.paths(CPU), ("diverse", "attention")
    assert len(rows) == len(gpu.TINY) * len(RETENTIONS) * len(anchors) * len(paths)
    assert {len(cells(line)) for line in (head, rule, *rows)} == {18}
    unknown_without_cuda = {"GPU busy, ms", "MiB added"}
    for row in rows:
        empty = {name for name, cell in zip(cells(head), cells(row), strict=True) if not cell}
        assert empty == unknown_without_cuda


def test_every_case_has_a_line_with_its_stages(results):
    head, _, *rows = gpu.stages_table(results).splitlines()
    assert [cells(row)[0] for row in rows] == [case.name for case in gpu.TINY]
    assert all(all(cells(row)) and len(cells(row)) == len(cells(head)) for row in rows)


def test_counts_are_those_of_the_budget_and_retention_1_changes_nothing(results):
    for case, result in zip(gpu.TINY, results, strict=True):
        for row in result["reductions"]:
            assert row["kept"] == budget(case.grid, retention=row["retention"]).total
            assert row["identity"] == (row["retention"] == 1)
    assert gpu.failures(results) == []


def test_what_is_written_can_be_read_again(results, tmp_path):
    gpu.write(tmp_path, results, "a card, torch 2, Triton 3, commit abc")
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored == {"machine": "a card, torch 2, Triton 3, commit abc", "results": results}
    sections = (tmp_path / "gpu.md").read_text().split("\n\n")
    assert sections[2:] == ["All checks passed.", "a card, torch 2, Triton 3, commit abc\n"]


def changed(change):
    """Return a reduction whose result is changed."""
    return lambda *args, **named: change(reduce_video(*args, **named))


def noisy(reduced):
    tokens = reduced.tokens.clone()
    tokens[0, 0] += torch.rand(())
    return dataclasses.replace(reduced, tokens=tokens)


def one_bit(reduced):
    """Change the lowest bit of one number, every other time."""
    one_bit.calls += 1
    tokens = reduced.tokens.clone()
    tokens.view(torch.int16)[-1, -1] ^= one_bit.calls % 2
    return dataclasses.replace(reduced, tokens=tokens)


one_bit.calls = 0


def swapped(reduced):
    order = torch.randperm(len(reduced.tokens))
    return dataclasses.replace(reduced, cols=reduced.cols[order])


def without_the_last(reduced):
    names = ("tokens", "frames", "rows", "cols")
    return dataclasses.replace(reduced, **{name: getattr(reduced, name)[:-1] for name in names})


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (noisy, r"of 20 repeats differ"),
        (one_bit, r"10 of 20 repeats differ"),
        (swapped, r"of 20 repeats differ"),
        (noisy, r"100%.*changes the video at retention 1"),
        (without_the_last, r"keeps 24 tokens, the budget says 25"),
    ],
)
def test_a_fault_is_reported(fault, said, monkeypatch):
    monkeypatch.setattr("bench.on_gpu.paths.reduce_video", changed(fault))
    assert any(re.search(said, text) for text in gpu.failures([measured()]))


def test_a_wait_on_a_warm_call_is_reported(results):
    result = json.loads(json.dumps(results[0]))
    result["reductions"][3]["warm"]["waits"] = 2
    assert [text.rpartition(": ")[2] for text in gpu.failures([result])] == ["a warm call waits 2 times"]


def test_a_fault_makes_the_script_fail(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TINY", gpu.TINY[:1])
    assert gpu.main(["--tiny", "--repeats", "1", "--retentions", "0.25"]) == 0
    assert "All checks passed." in capsys.readouterr().out
    monkeypatch.setattr("bench.on_gpu.paths.reduce_video", changed(noisy))
    assert gpu.main(["--tiny", "--repeats", "1", "--retentions", "0.25"]) == 1
    assert "FAILED" in capsys.readouterr().out


def with_another_path(**functions):
    """Return a measurement in which another path than torch's has these functions."""
    torch_path = gpu.paths(CPU)["torch"]
    implementations = {"torch": torch_path, "other": dataclasses.replace(torch_path, **functions)}
    return gpu.measure(gpu.TINY[0], CPU, implementations, retentions=RETENTIONS, repeats=1)


@pytest.mark.parametrize("anchors", ["diverse", "attention"])
def test_a_path_that_chooses_other_tokens_is_reported(anchors):
    def mirrored(features, *scores, **named):
        return reduce_video(*(part if part is None else part.flip(1) for part in (features, *scores)), **named)

    found = gpu.failures([with_another_path(reduce_video=mirrored)])
    assert all(", other: " in text for text in found)
    assert sum(f"{anchors}, other: another choice" in text for text in found) == 2


def test_a_path_with_other_scores_is_reported():
    torch_path = gpu.paths(CPU)["torch"]

    def louder(*args, **named):
        return torch_path.attention_received(*args, **named) * 1.1

    found = gpu.failures([with_another_path(attention_received=louder)])
    assert found == ["tiny, pooled, 4 x 25, other: scores differ by 1e-01"]


def documented(command):
    """Return the table that docs/performance.md has from a command."""
    page = (ROOT / "docs" / "performance.md").read_text()
    return re.search(rf"<!-- {re.escape(command)} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)[1]


def test_the_limits_that_the_docs_state_are_computed(capsys):
    assert gpu.main(["--flops"]) == 0
    table = capsys.readouterr().out.strip()
    assert documented("python bench/gpu.py --flops") == table
    onevision = gpu.CASES[0]
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    tower, whole = onevision.tower_flops(), onevision.prefill_flops(1.0)
    assert f"The tower is {tower / (tower + whole):.0%} of the work" in page
    assert f"at most {onevision.limit(0.10):.1f}x at 10%" in page
    text_alone = onevision.text.flops(sizes.TEXT_TOKENS)
    assert f"With no video token left it would still be {(tower + whole) / (tower + text_alone):.1f}x" in page


def test_the_launches_that_the_docs_state_are_counted():
    """The least of the torch path, as counting takes long: `make ci` compares the whole table."""
    pytest.importorskip("triton")
    rows = [cells(line) for line in documented("python bench/gpu.py --launches").splitlines()[2:]]
    assert len(rows) == 6 * len(gpu.CASES)
    for row in rows[:6]:
        assert f"{operations(gpu.CASES[0], 0.05, row[2], path=row[3]):,}" == row[-1]


@pytest.mark.slow
def test_all_launches_that_the_docs_state_are_counted():
    pytest.importorskip("triton")
    assert documented("python bench/gpu.py --launches") == gpu.operations_table(gpu.CASES)


def test_two_equal_paths_stand_side_by_side():
    result = with_another_path()
    assert gpu.failures([result]) == []
    assert [row["path"] for row in result["reductions"]] == ["torch", "other"] * 2 * len(RETENTIONS)


def reduced_to(grid, places):
    places = torch.tensor(places)
    whole = reduce_video(torch.randn(grid.frames, grid.positions, 4), None, None, grid=grid, retention=1)
    cells = places % grid.positions
    return dataclasses.replace(whole, frames=places // grid.positions, rows=cells // grid.cols, cols=cells % grid.cols)


def test_the_gap_of_a_different_choice_is_that_of_the_first_distances_that_differ():
    grid = VideoGrid(2, 1, 4)
    line = torch.tensor([[0.0, 1.0, 8.0, 10.0], [0.0, 2.0, 9.0, 9.0 + 1e-4]]).unsqueeze(2)
    reference = reduced_to(grid, [0, 3, 4, 7])
    assert choices.agreement(reference, reference, line, grid) == {"share": 1.0, "gap": None}
    # Frame 0 keeps 0 and 10. In frame 1 position 1 is 2 from them, position 2 is 1, and position 3 a little less.
    near = choices.agreement(reduced_to(grid, [0, 3, 4, 6]), reduced_to(grid, [0, 3, 4, 7]), line, grid)
    assert near == {"share": 0.75, "gap": pytest.approx(2e-4, rel=0.01)}
    far = choices.agreement(reduced_to(grid, [0, 3, 4, 6]), reduced_to(grid, [0, 3, 5, 6]), line, grid)
    assert far["gap"] == pytest.approx(1 - 1 / 4)
    # In frame 0 the first choice is the token farthest from the rest on average.
    first = choices.agreement(reduced_to(grid, [1, 4]), reduced_to(grid, [3, 4]), line, grid)
    assert first["gap"] == pytest.approx(1 - (1 + 49 + 81) / (100 + 81 + 4))


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", [*gpu.CASES, *gpu.TINY], ids=lambda case: f"{case.name} {case.grid.frames}")
def test_the_work_of_a_tower_is_that_of_the_products_it_runs(case):
    with META:
        tower = models.TowerModel(case)
    pixels = torch.empty(2, case.patches[0] * case.patches[1], case.tower.pixels, device=META)
    assert tower(pixels)[0].shape == (2, case.grid.positions, case.tower.out * case.tower.outputs)
    assert counted(lambda: tower(pixels)) == 2 * case.tower.flops(*case.patches)


@pytest.mark.parametrize("text", [sizes.QWEN2_7B, sizes.QWEN3_8B, sizes.TINY_TEXT])
@pytest.mark.parametrize("tokens", [100, 658])
def test_the_work_of_a_prefill_is_that_of_the_products_it_runs(text, tokens):
    with META:
        layer = models.Layer(text.width, text.heads, text.kv_heads, text.mlp, gated=True)
    once = counted(lambda: layer(torch.empty(1, tokens, text.width, device=META), causal=True))
    attention = 4 * tokens**2 * text.width  # counted as if no token were masked; half of them are
    assert text.flops(tokens) == text.layers * (once - attention // 2)


def test_published_sizes_are_those_that_transformers_knows():
    transformers = pytest.importorskip("transformers")
    siglip = transformers.LlavaOnevisionConfig().vision_config
    qwen25 = transformers.Qwen2_5_VLConfig().vision_config
    qwen3 = transformers.Qwen3VLConfig().vision_config

    for tower, known, width in (
        (sizes.SIGLIP, (siglip.num_hidden_layers, siglip.num_attention_heads), siglip.hidden_size),
        (sizes.QWEN25_TOWER, (qwen25.depth, qwen25.num_heads), 1280),  # the library's default is another size's
        (sizes.QWEN3_TOWER, (qwen3.depth, qwen3.num_heads), qwen3.hidden_size),
    ):
        assert (tower.layers, tower.heads, tower.width) == (*known, width)
    assert [sizes.SIGLIP.mlp, sizes.QWEN25_TOWER.mlp, sizes.QWEN3_TOWER.mlp] == [
        config.intermediate_size for config in (siglip, qwen25, qwen3)
    ]
    assert [sizes.QWEN25_TOWER.merge, sizes.QWEN3_TOWER.merge] == [qwen25.spatial_merge_size, qwen3.spatial_merge_size]
    assert sizes.SIGLIP.pixels == 3 * siglip.patch_size**2
    for tower, config in ((sizes.QWEN25_TOWER, qwen25), (sizes.QWEN3_TOWER, qwen3)):
        assert tower.pixels == 3 * config.temporal_patch_size * config.patch_size**2
    whole = [layer for layer in range(32) if (layer + 1) % sizes.QWEN25_TOWER.whole_every == 0]
    assert whole == list(qwen25.fullatt_block_indexes)
    assert sizes.QWEN3_TOWER.outputs == 1 + len(qwen3.deepstack_visual_indexes)


def test_operations_are_counted_without_views_and_allocations():
    with calls.Launches() as seen:
        values = torch.empty(4, 4, device=META)
        values.t().reshape(2, 8)[0].unsqueeze(0)
        assert seen.count == 1  # the transposed values are copied
        values.add_(1)
        torch.mm(values, values)
    assert seen.count == 3
    grid = gpu.TINY[0].grid
    assert operations(gpu.TINY[0], 1.0) < 10  # only where each token stands
    anchors = budget(grid, retention=0.5).anchors
    assert operations(gpu.TINY[0], 0.5) > grid.frames * anchors


def test_it_runs_with_torch_alone():
    code = (
        "import sys\n"
        "for name in ('vllm', 'transformers', 'numpy', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "sys.path.insert(0, '.')\n"
        "from bench import gpu\n"
        "gpu.TINY = gpu.TINY[1:]\n"
        "sys.exit(gpu.main(['--tiny', '--repeats', '1', '--retentions', '0.1']))\n"
    )
    # as on a bare machine: without the tests' own backend of Triton, which needs numpy
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "All checks passed." in done.stdout


@pytest.mark.parametrize("refused", [["--tiny", "--write"], ["--flops", "--write"]])
def test_nothing_is_written_that_no_gpu_measured(refused, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(refused)
    assert "measured on a GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_had():
    command = [sys.executable, str(ROOT / "bench" / "gpu.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no GPU here: --tiny" in done.stderr
