"""The transformer of §2.1.1 and §2.2: pure functions over parameters and a config, and one thin Linen shell."""
