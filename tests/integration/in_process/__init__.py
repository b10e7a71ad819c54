"""Tests of engines in the user's own process. The folder is a package because pytest ends what they share with it."""
