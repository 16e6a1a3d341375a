"""The way of a medium: fetched or uploaded, identified, probed, handed to the engine."""
