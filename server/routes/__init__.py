"""The gateway's endpoints: parse, limit, forward, answer; no rules."""
