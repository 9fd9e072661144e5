"""The paper's tables and figures, and ours: python -m analysis.table1, and so on, from the repository's root."""
