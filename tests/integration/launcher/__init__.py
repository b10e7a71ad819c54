"""Tests that share one Ray cluster. The folder is a package because pytest ends what they share with it."""
