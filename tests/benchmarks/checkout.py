"""Put the root of this checkout first on the path.

Importing it does so, and `python tests/benchmarks/steps.py` finds the product and tests/ here,
whatever is installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
