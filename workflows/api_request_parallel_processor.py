"""Told to those who type `python workflows/NAME.py`: for them Python finds this file, and not the program.

A workflow is a module of the checkout: `python -m workflows.NAME`, typed in the folder above.
"""

import sys
from pathlib import Path

folder, name = Path(__file__).resolve().parent, Path(sys.argv[0]).stem
print(f"Start it as a module: cd '{folder.parent}' && python -m {folder.name}.{name} ...", file=sys.stderr)
sys.exit(2)
