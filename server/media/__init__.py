"""Media: fetched or uploaded, identified, probed, and handed over to the engine."""
