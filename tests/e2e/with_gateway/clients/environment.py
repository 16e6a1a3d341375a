"""Make the clients' own environments, once: a virtual environment and Node packages. Standard library only.

The environment of the tests has OpenAI's SDK in version 3; the one made here has version 2, LiteLLM's SDK and
LangChain, as `requirements.txt` pins them, and `package-lock.json` pins those for Node.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[3] / ".cache" / "clients"
INSTALL = ("bin/python", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", "--no-deps")
NODE_FILES = ("package.json", "package-lock.json")


def made(name: str, sources: tuple[str, ...], commands: list[list[str]], tag: str) -> Path:
    """Return the directory with what `commands`, run in it, make of `sources`; another process may be at it."""
    digest = hashlib.sha256(b"\0".join([*((HERE / source).read_bytes() for source in sources), tag.encode()]))
    directory = CACHE / f"{name}-{digest.hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            for source in sources:
                shutil.copy(HERE / source, directory)
            for command in commands:
                done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}"[-3000:])
            (directory / "done").touch()
    return directory


def python() -> Path:
    """Return the interpreter of the Python clients."""
    commands = [[sys.executable, "-m", "venv", "."], [*INSTALL, "-r", "requirements.txt"]]
    return made("python", ("requirements.txt",), commands, sys.version) / "bin" / "python"


def lmms_eval() -> Path:
    """Return an interpreter with lmms-eval, which shares torch and transformers with this one, and takes its own else.

    Where it is used it is installed with all it asks for, several gigabytes of it.
    """
    share = "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'shared.pth').write_text({!r})"
    shared = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    commands = [
        [sys.executable, "-m", "venv", "."],
        [*INSTALL, "-r", "lmms_requirements.txt"],
        ["bin/python", "-c", share.format(shared)],
    ]
    return made("lmms", ("lmms_requirements.txt",), commands, sys.version + shared) / "bin" / "python"


def node_modules() -> Path:
    """Return the directory above the Node clients' `node_modules`."""
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return made("node", NODE_FILES, [["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]], version)
