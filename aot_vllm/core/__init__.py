"""The method on plain tensors, without an engine. Importing this package, its grids or its budgets loads no torch."""
