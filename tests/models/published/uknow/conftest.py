"""Files and networks that the stages are trained on."""

import pytest
from patch_files import Files


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Patches of 16 x 16."""
    return Files(tmp_path_factory.mktemp("small"), size=16)


@pytest.fixture(scope="session")
def eight(tmp_path_factory):
    """Eight bands in 10 bits."""
    return Files(tmp_path_factory.mktemp("eight"), bands=8, full_scale=1023.0)


@pytest.fixture(params=["files", "eight"])
def either(request):
    return request.getfixturevalue(request.param)
