"""The endpoints: each parses, limits, forwards and answers a request. The rules are in the other packages."""
