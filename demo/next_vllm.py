"""Make `.venv-next`: the next release of vLLM on a CPU, before there is a build of it for CPUs. Standard library only.

Run by `make test-next-vllm`, behind `make install-test`. The environment is the one in `.venv`, with the Python code of
the next release in front of what it has of vLLM, and beside that code the compiled parts of the release in `.venv`. So
its tests say whether the plugin fits the next release's Python; they say nothing of its kernels.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from environment import CONSTRAINTS, ROOT, in_venv, pip, python_of, say

NEXT_VLLM = "0.33.0"
ALSO = ("orjson",)
"""What the next release needs on a CPU and this one doesn't."""
COMPILED = "*.abi3.so"


def site_of(venv: Path) -> Path:
    """Return the directory of an environment's packages."""
    return Path(in_venv(venv, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))


def unpack_python(site: Path) -> None:
    """Put the next release's package into `site`, without what is compiled for GPUs in it."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*download, "--dest", folder, f"vllm=={NEXT_VLLM}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            archive.extractall(site, names)


def make(venv: Path, base: Path) -> None:
    """Make the environment `venv` on top of `base`."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    site, below = site_of(venv), site_of(base)
    # Behind this environment's own packages, and with what `base` does at its start.
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    say(f"-- the Python of vLLM {NEXT_VLLM}")
    unpack_python(site)
    for compiled in (below / "vllm").glob(COMPILED):
        (site / "vllm" / compiled.name).symlink_to(compiled)
    named = site / f"vllm-{NEXT_VLLM}+cpu.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {NEXT_VLLM}+cpu\n")
    (named / "RECORD").write_text("")
    (named / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n")
    script = venv / "bin" / "vllm"
    script.write_text(
        f"#!{python_of(venv)}\nimport sys\nfrom vllm.entrypoints.cli.main import main\n"
        'if __name__ == "__main__":  # processes that are spawned import this file\n    sys.exit(main())\n'
    )
    script.chmod(0o755)
    pip(venv, "what else it needs", *CONSTRAINTS, "--no-deps", *ALSO)


def main() -> None:
    """Make the environment, unless it is there for the `.venv` that there is."""
    base, venv = ROOT / ".venv", ROOT / ".venv-next"
    stamp = venv / "aot-environment.json"
    state = {
        "next": NEXT_VLLM,
        "base": json.loads((base / stamp.name).read_text()),
        "made by": Path(__file__).read_text(),
    }
    if state["base"]["gpu"]:
        sys.exit("this machine has a GPU: install the next release there as it is")
    if stamp.exists() and json.loads(stamp.read_text()) == state:
        return
    make(venv, base)
    found = in_venv(venv, "import vllm; print(vllm.__version__)")
    if not found.startswith(NEXT_VLLM):
        sys.exit(f"vLLM {NEXT_VLLM} can't be imported, got {found!r}")
    stamp.write_text(json.dumps(state))
    say(f"{venv.name} is ready.")


if __name__ == "__main__":
    main()
