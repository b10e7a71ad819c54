"""How processes are started, watched and ended, so that no process outlives its owner."""
