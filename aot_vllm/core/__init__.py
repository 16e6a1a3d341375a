"""The method on plain tensors, without an engine. Importing this package, `grid` or `budget` does not load torch."""
