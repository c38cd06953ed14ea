"""Programs: python -m experiments.NAME --config=configs/NAME.py:VARIANT --workdir=runs/NAME"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say at every start that there is no PyTorch
