from tests.data_fixtures import config, corpus  # noqa: F401
