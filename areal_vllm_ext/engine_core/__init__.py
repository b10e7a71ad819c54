"""What lives in an EngineCore process."""
