"""The edge: what happens to a request before it reaches a route, and to the answer after it leaves the route."""
