"""What lives in the trainer."""
