"""Compiles every kernel for one architecture, without a GPU, and prints the registers and spills of each as JSON.

    python -m tests.kernels.compile 90

Runs in a process of its own, because a process that interprets kernels cannot compile them.
"""

import contextlib
import io
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aot_vllm.core.coverage import OWN
from aot_vllm.kernels import anchors, attention, calibration, coverage, lengths, transport

triton.knobs.nvidia.dump_ptxas_log = True  # its table of registers and spills, on standard output

POINTERS = {
    "order_ptr": "*i64",
    "keep_ptr": "*i64",
    "best_ptr": "*i64",
    "arrived_ptr": "*i32",
    "taken_ptr": "*i32",
    "anchors_ptr": "*i64",
    "nearest_ptr": "*i32",
    "iterations_ptr": "*i64",
    "converged_ptr": "*i1",
}
FLOATS = {
    *("row_height", "col_width", "spatial_weight", "epsilon", "shortest", "smallest", "largest"),
    *("tolerance", "mass", "nearest_weight", "scale"),
    *("extreme", "most", "similar", "least"),
}


def shapes():
    """Yield a name, a kernel, its constants, its warps and the types of its features for each case."""
    yield from _choices()
    for slots in (16, 32, 64, 128, 1024, 4096):
        for nearest in (False, True):
            shape = {"NEAREST": nearest, "TOKENS": transport.TILE // slots, "ANCHORS": slots}
            yield f"scalings {slots} {nearest}", transport._scalings, shape, 8, "fp32"
            solved = shape | {"SOLVED": True, "STEPS": 32, "FRAMES": transport.FRAMES}
            yield f"weights {slots} {nearest}", transport._weights, solved, 8, "fp32"
    for dtype in ("bf16", "fp16", "fp32"):
        for slots in (16, 32, 64):
            blocks = {"ANCHORS": slots, "TOKENS": 32, "COLUMNS": 128}
            yield f"merge {dtype} {slots}", transport._merge, blocks, 8 if slots == 64 else 4, dtype
        for size in (64, 72, 128):  # 72 and 80 are split alike
            blocks = attention.blocks_for(torch.float32 if dtype == "fp32" else torch.float16, size)
            warps = blocks.pop("num_warps")
            for kernel in (attention._log_sums, attention._received):
                yield f"{kernel.__name__} {dtype} {size}", kernel, blocks, warps, dtype
    for name, kernel, constants, warps, dtype in list(_small()):
        # Triton makes a constant of every integer that is 1 at a launch.
        ones = [one for one in kernel.arg_names if one not in constants and type_of(one, dtype) == "i32"]
        if kernel in (transport._scalings, transport._weights):
            ones.remove("positions")  # more than the anchors
        yield f"{name} of ones", kernel, dict.fromkeys(ones, 1) | constants, warps, dtype


def _choices():
    """Yield the cases of the choice of anchors."""
    for positions in (196, 300, 729, 4096):
        block = triton.next_power_of_2(positions)
        warps = max(1, min(16, block // 512))
        yield f"spread_out {positions}", anchors._spread_out, _PLAIN | {"BLOCK": block}, warps, "fp32"
        yield f"spread_out {positions} with all", anchors._spread_out, _FULL | {"BLOCK": block}, warps, "fp32"
        warps = max(1, min(16, block // 256))
        for carried in (False, True):
            yield f"cover {positions} {carried}", coverage._cover, _covering(block, carried), warps, "fp32"
        for cosine in (False, True):
            yield f"scales {positions}", lengths._scales, {"COSINE": cosine, "BLOCK": block}, warps, "fp32"
        yield f"in_medians {positions}", calibration._in_medians, {"BLOCK": block}, warps, "fp32"
    for dtype in ("bf16", "fp16", "fp32"):
        without = _without_table(anchors.COLUMNS)
        yield f"spread_out_without_table {dtype}", anchors._spread_out_without_table, without, 16, dtype
        full = without | _FULL
        yield f"spread_out_without_table with all {dtype}", anchors._spread_out_without_table, full, 16, dtype
        full |= {"ALL": True, "CARRIED": False}
        yield f"spread_out_without_table of all frames {dtype}", anchors._spread_out_without_table, full, 16, dtype
        for kernel in (lengths._changes, lengths._totals):
            yield f"{kernel.__name__} {dtype}", kernel, _RUNS, 4, dtype
        for on in (False, True):
            flags = {"RELEVANCE": True, "ATTENTION": on, "SINKS": on}
            yield f"weigh {dtype} {on}", calibration._weigh, _RUNS | flags, 4, dtype


_PLAIN = {"WEIGHTED": False, "CARRIED": False}
_FULL = {"WEIGHTED": True, "CARRIED": True}
_RUNS = {"TOKENS": lengths.TOKENS, "COLUMNS": lengths.COLUMNS}


def _covering(block, carried):
    return {"CARRIED": carried, "BEHIND_ALL": anchors.BEHIND_ALL, "OWN": OWN, "BLOCK": block}


def _small():
    """Yield one case of each kernel."""
    yield "spread_out", anchors._spread_out, _FULL | {"BLOCK": 1}, 1, "fp32"
    yield "cover", coverage._cover, _covering(1, True), 1, "fp32"
    yield "scales", lengths._scales, {"COSINE": False, "BLOCK": 1}, 1, "fp32"
    yield "changes", lengths._changes, _RUNS, 4, "bf16"
    yield "totals", lengths._totals, _RUNS, 4, "bf16"
    yield "in_medians", calibration._in_medians, {"BLOCK": 1}, 1, "fp32"
    yield "resemblance", calibration._resemblance, {"COLUMNS": lengths.COLUMNS}, 4, "fp32"
    yield "segments", calibration._segments, {"COLUMNS": lengths.COLUMNS}, 4, "fp32"
    flags = {"RELEVANCE": True, "ATTENTION": True, "SINKS": True}
    yield "weigh", calibration._weigh, _RUNS | flags, 4, "bf16"
    yield "spread_out_without_table", anchors._spread_out_without_table, _without_table(1), 16, "bf16"
    shape = {"NEAREST": True, "TOKENS": 4, "ANCHORS": 1}
    yield "scalings", transport._scalings, shape, 8, "fp32"
    yield "weights", transport._weights, shape | {"SOLVED": True, "STEPS": 1, "FRAMES": 32}, 8, "fp32"
    yield "merge", transport._merge, {"ANCHORS": 16, "TOKENS": 32, "COLUMNS": 128}, 4, "bf16"
    blocks = attention.blocks_for(torch.bfloat16, 16)
    warps = blocks.pop("num_warps")
    yield "log_sums", attention._log_sums, blocks, warps, "bf16"
    yield "received", attention._received, blocks, warps, "bf16"


def _without_table(columns):
    sizes = {"BEHIND_ALL": anchors.BEHIND_ALL, "TOKENS": anchors.TOKENS, "COLUMNS": columns}
    return _PLAIN | sizes | {"ALL": False}


def type_of(name, dtype):
    """Return the type of a kernel's argument."""
    if name in ("features_ptr", "query_ptr", "key_ptr", "merged_ptr"):
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*fp32")
    return "fp32" if name in FLOATS else "i32"


def resources(kernel, constants, warps, dtype, capability):
    """Return the registers and the bytes of spills of a compiled kernel."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name, dtype) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # As at a launch: contiguous columns are known to be contiguous, and pointers are aligned.
    strides = [name for name in names if name in ("stride_column", "q_size", "k_size") and name not in constants]
    signature |= dict.fromkeys(strides, "constexpr")
    values |= {(names.index(name),): 1 for name in strides}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, values, attributes)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    said, ptx = log.getvalue(), compiled.asm["ptx"]
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spills": int(re.search(r"(\d+) bytes spill stores", said).group(1)),
        "shared": compiled.metadata.shared,
        "redux": ptx.count("redux.sync"),
        "barriers": ptx.count("bar.sync"),
    }


if __name__ == "__main__":
    capability, wanted = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    found = {
        name: resources(kernel, constants, warps, dtype, capability)
        for name, kernel, constants, warps, dtype in shapes()
        if wanted in name
    }
    print(json.dumps(found))
