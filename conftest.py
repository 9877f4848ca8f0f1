"""Loads the plugin that makes preset files test files."""

pytest_plugins = ["harness.pytest_plugin"]
