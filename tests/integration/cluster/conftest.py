"""What the tests of a cluster share."""

import pytest

from isthmus.demo.tiny.assets import write_tiny_assets
from tests.integration.cluster.raylets import Raylets


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """The data set and the models of recipes/tiny.yaml, in small."""
    folder = tmp_path_factory.mktemp("assets")
    write_tiny_assets(folder, 200, 8)
    return folder


@pytest.fixture(scope="module")
def raylets():
    """Ray of two nodes, for the tests of one file."""
    raylets = Raylets(2)
    raylets.connect("demo")
    yield raylets
    raylets.close()
