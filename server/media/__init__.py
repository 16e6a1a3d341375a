"""Media: fetched or uploaded, identified, read in a process of its own, and handed over to the engine."""
