import importlib.metadata
import subprocess
import sys

import pytest

import aot_vllm


@pytest.mark.parametrize(
    "statement",
    [
        "import aot_vllm",
        "import aot_vllm.plugin",
        "import aot_vllm; aot_vllm.__version__",
        "from aot_vllm import AOTConfig, VideoGrid, budget",
        "import aot_vllm.core.budget",
        "dir(__import__('aot_vllm'))",
    ],
)
def test_sizes_and_settings_need_no_torch(statement):
    check = f"{statement}; import sys; print([m for m in ('torch', 'vllm', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    for name in aot_vllm.__all__:
        assert getattr(aot_vllm, name).__name__ == name
        assert name in dir(aot_vllm)


def test_the_version_is_that_of_the_installed_distribution():
    assert aot_vllm.__version__ == importlib.metadata.version("aot-vllm")
    assert "__version__" in dir(aot_vllm)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    with pytest.raises(AttributeError, match="no __version__, because the distribution aot-vllm is not installed"):
        aot_vllm.__version__  # noqa: B018


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="reduce_vido"):
        aot_vllm.reduce_vido  # noqa: B018
