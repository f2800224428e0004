import pytest


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without figures, which take most of their time."""
    monkeypatch.setattr("mambaseg.reporting.report.draw", lambda *_: [])
