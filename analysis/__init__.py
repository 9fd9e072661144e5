"""The paper's tables and figures, and ours: python -m analysis.table1, and so on, from the repository's root."""

import os

os.environ["MPLBACKEND"] = "Agg"  # figures are files: a display, even a broken one, is not asked
