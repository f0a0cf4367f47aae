"""From requests to pictures."""
