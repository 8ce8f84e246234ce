"""Put the root of this checkout first on the path, so that `python tests/benchmarks/steps.py` finds
the product and tests/ here, whatever is installed. Importing it does so.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
