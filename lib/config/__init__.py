"""Frozen, validated configuration: reading, overriding, digests. Knows no experiment."""

import os

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would look for one in every package that there is
