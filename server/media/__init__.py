"""The way of a media URL: fetched, identified, probed, handed to the engine."""
