"""Measures of a model: losses of rows of tokens, task suites."""
