"""The engines: which are up, which one takes a request, and what it answers."""
