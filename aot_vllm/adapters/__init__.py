"""The only place that knows vLLM: which models, where their attention is read, and what was saved."""
