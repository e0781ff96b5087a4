import sys

from vit.commands.cli import main

sys.exit(main())
