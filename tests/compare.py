from vit.testing import *  # noqa: F403
