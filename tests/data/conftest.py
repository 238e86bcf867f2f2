"""The marker of tests that fetch a demo package, once: it stays in the user's cache."""


def pytest_configure(config):
    config.addinivalue_line("markers", "network: fetches a demo package from a registry, once")
