"""The only package that knows vLLM: the models, the attention in their towers, and the telemetry."""
