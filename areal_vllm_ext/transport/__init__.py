"""How bytes travel from the trainer to the workers: one file per transport, with both ends in it."""
