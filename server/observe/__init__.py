"""What happened: the record of a request, and the metrics, traces and log lines made from it."""
