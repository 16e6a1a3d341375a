"""The engines: which of them are up, which one gets a request, and how its answer comes back."""
