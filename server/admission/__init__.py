"""Who may use the gateway, how much, and how many requests at once."""
