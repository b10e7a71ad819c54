"""What was done, when, and for how long."""
