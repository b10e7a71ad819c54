"""Who may command the engines: the directory, the lease, connections and recovery. Nothing here imports torch."""
