"""`python -m keras_mp` is `keras-mp`."""

from __future__ import annotations

import sys

from keras_mp.cli import main

if __name__ == "__main__":
    sys.exit(main())
