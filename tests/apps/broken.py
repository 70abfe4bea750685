"""An app whose import fails."""

import os

SECRET = os.environ["SHOP_SECRET"]
