"""What a request says: parsed, checked against the operator's bounds, made ready for the engine."""
