"""All architectures of the zoo, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.zoo.architecture import Architecture
from tests.zoo.networks import NETWORKS
from tests.zoo.tables import TABLES
from tests.zoo.text import TEXT
from tests.zoo.vision import VISION

ARCHITECTURES: Mapping[str, Architecture] = {one.name: one for one in (*TEXT, *VISION, *NETWORKS, *TABLES)}
