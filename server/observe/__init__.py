"""Observability: the record of each request, and the metrics, traces and log lines that are made from it."""
