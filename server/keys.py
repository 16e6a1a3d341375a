"""`python -m server.keys`: prints a new API key, and its SHA-256 for the configuration file."""

import hashlib
import secrets
import sys

PREFIX = "sk-aot-"  # scanners for leaked secrets recognise "sk-"
ENTROPY_BYTES = 32


def new_key() -> str:
    """Return a new random key with 256 bits of entropy."""
    return PREFIX + secrets.token_urlsafe(ENTROPY_BYTES)


def digest_of(key: bytes) -> str:
    """Return the SHA-256 of `key` in hexadecimal.

    A fast hash without salt is enough. Slow, salted hashes protect passwords, which people choose and which can be
    guessed. A key with 256 bits of entropy can't be guessed, and a slow hash would slow down every request.
    """
    return hashlib.sha256(key).hexdigest()


def main() -> int:
    """Print a new key and its hash."""
    key = new_key()
    sys.stdout.write(
        f"key:    {key}\nsha256: {digest_of(key.encode())}\n"
        "Give the key to the tenant: it is not shown again. Put the hash into the configuration file.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
