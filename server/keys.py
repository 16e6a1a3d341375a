"""`python -m server.keys`: a new API key, and its SHA-256 for the configuration file."""

import hashlib
import secrets
import sys

PREFIX = "sk-aot-"  # scanners for leaked secrets know the first part
ENTROPY_BYTES = 32


def new_key() -> str:
    """Return a key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(ENTROPY_BYTES)


def digest_of(key: bytes) -> str:
    """Return the SHA-256 of `key` in hexadecimal.

    Slow hashes with salt are for passwords, which people choose: of a key with 256 random bits no hash can be turned
    back by trying, and a slow one would only make each request slow.
    """
    return hashlib.sha256(key).hexdigest()


def main() -> int:
    """Print a key and its hash."""
    key = new_key()
    sys.stdout.write(
        f"key:    {key}\nsha256: {digest_of(key.encode())}\n"
        "The key is for the tenant and is shown only now; the hash is for the configuration file.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
