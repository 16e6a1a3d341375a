"""Opens media: runs in a process of its own, without the rest of the gateway, and hands over frames."""
