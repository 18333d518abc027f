"""python -m otad"""

import sys

from otad.cli import main

sys.exit(main())
