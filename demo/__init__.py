"""The demo, the task and the embedded model: `python -m demo.run`."""
