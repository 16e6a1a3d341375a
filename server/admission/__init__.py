"""Admission: who may use the gateway, how much each tenant may use, and how many requests may run at once."""
