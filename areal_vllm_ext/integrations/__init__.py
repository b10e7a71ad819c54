"""Other packages' interfaces to ``EngineGroup``, one folder each. Only who asks for one imports it."""
