"""What every client is asked to do, and how it says what came of it."""

import json
import sys

asked = json.loads(sys.stdin.readline())
QUESTION = "What happens?"
VIDEO = {"type": "video_url", "video_url": {"url": asked["clip_url"]}}
ENDLESS = 7000


def wait_for_the_verdict(**seen):
    """Say what was seen, an endless stream having been left, and stay until the engine has been looked at."""
    print(json.dumps(seen), flush=True)
    sys.stdin.readline()
