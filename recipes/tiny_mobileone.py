"""Rebuild tiny-mobileone: tiny-repvgg's layout with MobileOne's blocks, depthwise and pointwise.

    python recipes/tiny_mobileone.py --data FOLDER --out OUT

Data, training and time as for recipes/tiny_repvgg.py.
"""

from __future__ import annotations

import sys

import tiny_repvgg

if __name__ == "__main__":
    sys.exit(tiny_repvgg.main(kind="mobileone"))
