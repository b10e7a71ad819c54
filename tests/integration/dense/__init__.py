"""Tests that share one deployment of a dense model. The folder is a package because pytest ends what they share with it."""
