"""Make the clients' own environments, once: a virtual environment and Node packages. Standard library only.

The environment of the tests has OpenAI's SDK in version 3. Two are made here for clients that ask for one version of
it: version 2 with LiteLLM's SDK, LangChain, LlamaIndex and instructor (`requirements.txt`), version 3 with pydantic-ai
(`requirements_openai_3.txt`). `package-lock.json` pins the packages for Node; `ai_sdk_6/` has Vercel's AI SDK in its
earlier version.
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


def python(requirements: str = "requirements.txt") -> Path:
    """Return the interpreter of the Python clients that a file pins."""
    commands = [[sys.executable, "-m", "venv", "."], [*INSTALL, "-r", requirements]]
    name = requirements.removesuffix(".txt").replace("requirements", "python")
    return made(name, (requirements,), commands, sys.version) / "bin" / "python"


def python_with_openai_3() -> Path:
    """Return the interpreter of the Python clients that need OpenAI's SDK in version 3."""
    return python("requirements_openai_3.txt")


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


def node_modules(folder: str = "") -> Path:
    """Return the directory above the `node_modules` that the lock file in a folder here pins."""
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    files = tuple(str(Path(folder, file)) for file in NODE_FILES)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    return made(folder or "node", files, [command], version)
