"""``python -m areal_vllm_ext.cli`` is ``areal-vllm``."""

import sys

from .commands import main

sys.exit(main())
