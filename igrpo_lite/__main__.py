"""``python -m igrpo_lite`` is ``igrpo-lite``."""

import sys

from igrpo_lite.cli import main

sys.exit(main())
