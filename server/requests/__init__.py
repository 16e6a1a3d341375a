"""Requests: parsed, checked against the operator's bounds, and rewritten for the engine."""
