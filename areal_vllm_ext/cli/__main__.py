"""``python -m areal_vllm_ext.cli`` is ``areal-vllm``."""

import sys

from . import main

sys.exit(main())
