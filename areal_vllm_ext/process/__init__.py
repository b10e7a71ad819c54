"""How processes are started, watched and ended, so that nothing outlives its owner."""
