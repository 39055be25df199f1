"""Grouped products [§2.1.2]: rows sorted by expert, each times its own expert's matrix."""
